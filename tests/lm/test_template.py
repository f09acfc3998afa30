"""Chat templates give what transformers gives, and do nothing else."""

import json

import pytest

from egjax.errors import EgjaxError
from egjax.lm.template import ChatTemplate, plain_source

TALK = [
    {"role": "system", "content": "  You plan. "},
    {"role": "user", "content": "Fetch the cup <now>"},
    {"role": "assistant", "content": 'Walk to "kitchen".\nGrab cup.'},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Done."},
]
CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# In the manner of Llama 3: marks, a date, a loop that skips, JSON.
MARKED = """{{- bos_token }}
{%- if not date is defined %}{%- if strftime_now is defined %}
{%- set date = strftime_now("%d %b %Y") %}
{%- else %}{%- set date = "26 Jul 2024" %}{%- endif %}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- continue %}{%- endif %}
    {%- generation %}{{- '[' + message.role + ']' + (message.content | tojson) + eos_token }}
    {%- endgeneration %}
{%- endfor %}
{%- if tools is not none %}{{- raise_exception("no tools") }}{%- endif %}"""


def folder(tmp_path, source, in_settings=True):
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "model_max_length": 9}
    if in_settings:
        settings["chat_template"] = source
    else:
        (tmp_path / "chat_template.jinja").write_text(source)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.mark.parametrize("ask", [False, True])
@pytest.mark.parametrize("source", [CHATML, MARKED.replace("strftime_now is defined", "false")])
def test_as_transformers_renders_it(tmp_path, source, ask):
    tools = pytest.importorskip("transformers.utils.chat_template_utils")
    ours = ChatTemplate.load(folder(tmp_path, source)).render(TALK, ask=ask)
    (theirs,), _ = tools.render_jinja_template(
        [TALK],
        chat_template=source,
        add_generation_prompt=ask,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert ours == theirs
    assert "Grab cup." in ours


@pytest.mark.parametrize("marks", [("<s>", "</s>"), ("", ""), ('<"\\', "<｜end▁of▁sentence｜>")])
def test_the_plain_format_as_a_template(tmp_path, marks):
    source, plain = plain_source(*marks), ChatTemplate()
    written = ChatTemplate(source)
    assert written.render(TALK) == marks[0] + plain.render(TALK) + marks[1]
    assert written.render(TALK, ask=True) == marks[0] + plain.render(TALK, ask=True)
    # Read again it is the plain format, whose marks the tokenizer's user adds.
    assert ChatTemplate.load(folder(tmp_path, source, in_settings=False)) == plain
    assert ChatTemplate.load(folder(tmp_path, source + " ", in_settings=False)).source


def test_where_templates_are(tmp_path):
    plain = ChatTemplate.load(tmp_path)
    assert plain == ChatTemplate()
    assert plain.render(TALK[1:2], ask=True) == "user: Fetch the cup <now>\nassistant:"
    own = ChatTemplate.load(folder(tmp_path, CHATML, in_settings=False))
    assert own == ChatTemplate.load(folder(tmp_path, CHATML))
    assert own.fingerprint != plain.fingerprint
    several = [{"name": "default", "template": CHATML}, {"name": "tools", "template": "x"}]
    (tmp_path / "chat_template.jinja").unlink()
    assert ChatTemplate.load(folder(tmp_path, several)) == own
    with pytest.raises(EgjaxError, match="none is the default"):
        ChatTemplate.load(folder(tmp_path, several[1:]))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(EgjaxError, match=r"tokenizer_config\.json: not JSON"):
        ChatTemplate.load(tmp_path)


def test_the_same_text_on_every_day(tmp_path):
    assert "26 Jul 2024" in ChatTemplate(MARKED + "{{ date }}", (("bos_token", ""),)).render([])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "broken"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{% include '/etc/passwd' %}", "refuses"),
        ("{{ messages + 1 }}", "refuses"),
    ],
)
def test_what_a_template_may_not_do_is_one_line(source, said):
    with pytest.raises(EgjaxError, match=said):
        ChatTemplate(source).render(TALK)
