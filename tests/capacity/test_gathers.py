"""A step whose matrices are split over both axes of a mesh never holds one of them whole."""

SCRIPT = """
import math, re
from egjax.capacity.hlo import collectives
from egjax.capacity.stages import Case, program
from egjax.lm.config import LlamaConfig
from egjax.mesh import make_mesh
from egjax.train.layout import Layout

config = LlamaConfig(512, 64, 224, 2, 8, 8, 8, max_seq_len=256, tie_embeddings=False)
mesh = make_mesh(data=2, model=4)
layout = Layout(remat="full", chunked=True, attention="dense")
what = program(Case("sft", config, config, 4, 128, layout=layout), mesh)
text = what.function.lower(*what.arguments).compile().as_text()
whole = 64 * 224  # as many entries as a matrix of the MLP; an attention matrix has 64 * 64
for one in collectives(text, 8):
    shapes = re.findall(r"\\[([\\d,]+)\\]", one.shape)
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
    if whole in sizes or (64 * 64 in sizes and one.operation == "all-gather"):
        print(one)
"""


def test_no_matrix_is_gathered_whole(on_devices):
    assert on_devices(SCRIPT, 8) == ""
