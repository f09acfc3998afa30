"""Collectives and loops counted in HLO text, against counts by hand."""
# ruff: noqa: E501 (HLO has long lines)

from egjax.capacity.hlo import Collective, collectives, loops

# A loop of 5 rounds around a loop from 2 to 8; the outer all-gather is cut into two pieces that
# share a channel, one of them inside the inner loop's fusion.
TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%piece (p: bf16[2,8]) -> bf16[8,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%inner_cond (c: (u32[], f32[16])) -> pred[] {
  %bound = u32[]{:T(128)} constant(8)
  %c = (u32[], f32[16]) parameter(0)
  %i = u32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%inner_body (c.1: (u32[], f32[16])) -> (u32[], f32[16]) {
  %c.1 = (u32[], f32[16]) parameter(0)
  %x = f32[16]{0} get-tuple-element(%c.1), index=1
  %f = bf16[8,8] fusion(%x), kind=kCustom, calls=%piece
  %send = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %done = f32[16]{0} collective-permute-done(%send)
  ROOT %next = (u32[], f32[16]) tuple(%x, %done)
}

%outer_cond (d: (s32[], f32[16])) -> pred[] {
  %many = s32[] constant(5)
  %d = (s32[], f32[16]) parameter(0)
  %j = s32[] get-tuple-element(%d), index=0
  ROOT %lt.1 = pred[] compare(%j, %many), direction=LT, metadata={op_name="while/cond/lt"}
}

%outer_body (d.1: (s32[], f32[16])) -> (s32[], f32[16]) {
  %d.1 = (s32[], f32[16]) parameter(0)
  %y = f32[16]{0} get-tuple-element(%d.1), index=1
  %two = u32[] constant(2)
  %start = (u32[], f32[16]) tuple(%two, %y)
  %all-gather.1 = bf16[8,8]{1,0} all-gather(%y), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  %loop.1 = (u32[], /*index=1*/f32[16]) while(%start), condition=%inner_cond, body=%inner_body
  %total = f32[16]{0} all-reduce(%y), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %out = (s32[], f32[16]) tuple(%y, %total)
}

ENTRY %main (q: f32[16]) -> f32[16] {
  %q = f32[16]{0} parameter(0)
  %zero = s32[] constant(0)
  %first = (s32[], f32[16]) tuple(%zero, %q)
  %loop.2 = (s32[], f32[16]) while(%first), condition=%outer_cond, body=%outer_body
  %scattered = f32[4]{0} reduce-scatter(%q), channel_id=11, replica_groups=mesh['data'=4,'model'=2] {'data'}, dimensions={0}, to_apply=%add
  ROOT %z = f32[16]{0} get-tuple-element(%loop.2), index=1
}
"""


def test_a_started_all_reduce_of_several_arrays_sends_what_a_plain_one_does():
    """Its shape is that of the results alone, which of a started gather come after the operands."""
    text = """HloModule m

ENTRY %main (a: f32[1024], b: f32[4096]) -> f32[1024] {{
  %a = f32[1024]{{0}} parameter(0)
  %b = f32[4096]{{0}} parameter(1)
  ROOT %sum = (f32[1024], f32[4096]) {opcode}(%a, %b), replica_groups={{{{0,1}}}}, to_apply=%add
}}
"""
    plain, started = (
        collectives(text.format(opcode=opcode), 2) for opcode in ("all-reduce", "all-reduce-start")
    )
    assert started == plain
    assert plain[0].bytes_sent == 4 * (1024 + 4096)


def test_loops_run_from_their_start_to_their_bound():
    assert loops(TEXT) == {"%loop.1": 6, "%loop.2": 5}
    told = TEXT.replace(
        "condition=%outer_cond, body=%outer_body",
        'condition=%outer_cond, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}',
    )
    assert loops(told)["%loop.2"] == 3


def test_a_loop_whose_rounds_are_taken_two_at_a_time_runs_half_as_often():
    counted = TEXT.replace(
        "  ROOT %next = (u32[], f32[16]) tuple(%x, %done)",
        """  %k = u32[]{:T(128)} get-tuple-element(%c.1), index=0
  %step = u32[]{:T(128)} constant(2)
  %later = u32[]{:T(128)} add(%k, %step), metadata={op_name="while/body/add"}
  %copied = u32[]{:T(128)} copy(%later)
  ROOT %next = (u32[], f32[16]) tuple(%copied, %done)""",
    )
    assert loops(counted)["%loop.1"] == 3
    thrice = counted.replace("%step = u32[]{:T(128)} constant(2)", "%step = u32[] constant(4)")
    assert loops(thrice)["%loop.1"] == 2
    sends = next(c for c in collectives(counted, 8) if c.operation == "collective-permute")
    assert sends.times == 15


def test_collectives_count_as_often_as_their_loops_and_once_a_channel():
    assert collectives(TEXT, 8) == [
        Collective("collective-permute", "f32[16]", 2, 30, 30 * 64),
        Collective("all-gather", "bf16[8,8]", 4, 5, 5 * 128 * 3 / 4),
        Collective("all-reduce", "f32[16]", 4, 5, 5 * 2 * 64 * 3 / 4),
        Collective("reduce-scatter", "f32[4]", 4, 1, 16 * 3),
    ]


def test_a_collective_without_groups_is_of_all_devices():
    bare = TEXT.replace("replica_groups={{0,1,2,3},{4,5,6,7}}, ", "replica_groups={}, ")
    found = {c.operation: c for c in collectives(bare, 8)}
    assert found["all-reduce"].devices == 8
    assert collectives("", 8) == []
