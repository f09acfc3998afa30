"""Bytes and operations of a small program, counted by hand."""

from dataclasses import replace

from egjax.capacity.kernels import Kernel, kernels

TEXT = """HloModule jit_f

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_cut (p0: bf16[4,8,16], p1: s32[], p2: bf16[8]) -> bf16[16] {
  %p0 = bf16[4,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = bf16[8]{0} parameter(2)
  %zero = s32[] constant(0)
  %cut = bf16[1,8,16]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,16}
  %matrix = bf16[8,16]{1,0} bitcast(%cut)
  ROOT %product = bf16[16]{0} dot(%p2, %matrix), lhs_contracting_dims={0}, rhs_contracting_dims={0}
}

%fused_put (q0: f32[4,16], q1: f32[1,16], q2: s32[]) -> f32[4,16] {
  %q0 = f32[4,16]{1,0} parameter(0)
  %q1 = f32[1,16]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %nought = s32[] constant(0)
  ROOT %put = f32[4,16]{1,0} dynamic-update-slice(%q0, %q1, %q2, %nought)
}

%layer (state: (s32[], bf16[4,8,16], bf16[8])) -> (s32[], bf16[4,8,16], bf16[8]) {
  %state = (s32[], bf16[4,8,16]{2,1,0}, bf16[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %w = bf16[4,8,16]{2,1,0} get-tuple-element(%state), index=1
  %x = bf16[8]{0} get-tuple-element(%state), index=2
  %y = bf16[16]{0} fusion(%w, %i, %x), kind=kCustom, calls=%fused_cut, metadata={op_name="layer"}
  ROOT %next = (s32[], bf16[4,8,16]{2,1,0}, bf16[8]{0}) tuple(%i, %w, %x)
}

%more (state.1: (s32[], bf16[4,8,16], bf16[8])) -> pred[] {
  %state.1 = (s32[], bf16[4,8,16]{2,1,0}, bf16[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(4)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

%token (loop: (s32[], f32[4,16], f32[1,16])) -> (s32[], f32[4,16], f32[1,16]) {
  %loop = (s32[], f32[4,16]{1,0}, f32[1,16]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%loop), index=0
  %store = f32[4,16]{1,0} get-tuple-element(%loop), index=1
  %row = f32[1,16]{1,0} get-tuple-element(%loop), index=2
  %stored = f32[4,16]{1,0} fusion(%store, %row, %n), kind=kLoop, calls=%fused_put
  ROOT %again = (s32[], f32[4,16]{1,0}, f32[1,16]{1,0}) tuple(%n, %stored, %row)
}

%going (loop.1: (s32[], f32[4,16], f32[1,16])) -> pred[] {
  %loop.1 = (s32[], f32[4,16]{1,0}, f32[1,16]{1,0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%loop.1), index=0
  %end = s32[] constant(9)
  ROOT %on = pred[] compare(%end, %n.1), direction=GT
}

ENTRY %main (e0: s32[], e1: bf16[4,8,16], e2: bf16[8], e3: f32[4,16], e4: f32[1,16]) -> f32[16,4] {
  %e0 = s32[] parameter(0)
  %e1 = bf16[4,8,16]{2,1,0} parameter(1)
  %e2 = bf16[8]{0} parameter(2)
  %e3 = f32[4,16]{1,0} parameter(3)
  %e4 = f32[1,16]{1,0} parameter(4)
  %start = (s32[], bf16[4,8,16]{2,1,0}, bf16[8]{0}) tuple(%e0, %e1, %e2)
  %layers = (s32[], bf16[4,8,16]{2,1,0}, bf16[8]{0}) while(%start), condition=%more, body=%layer, backend_config={"known_trip_count":{"n":"4"}}
  %begin = (s32[], f32[4,16]{1,0}, f32[1,16]{1,0}) tuple(%e0, %e3, %e4)
  %tokens = (s32[], f32[4,16]{1,0}, f32[1,16]{1,0}) while(%begin), condition=%going, body=%token
  %kept = f32[4,16]{1,0} get-tuple-element(%tokens), index=1
  %called = (f32[4,4]{1,0}, s8[64]{0}) custom-call(%kept, %kept), custom_call_target="__cublas$gemm", backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}
  ROOT %turned = f32[16,4]{0,1} copy(%kept), metadata={op_name="turned"}
}
"""  # noqa: E501


def test_a_kernel_reads_what_it_cuts_and_writes_what_it_puts():
    found = {one.operation + one.source: one for one in kernels(TEXT)}
    # One layer of four, 8 · 16 of bfloat16, with the vector and the index; four times.
    layer = Kernel("fusion", "layer", 4, 256 + 4 + 16, 32, 2 * 8 * 16)
    assert found["fusionlayer"] == layer
    # A row of the store, its index; of the row that is overwritten nothing is read.
    assert found["fusion"] == Kernel("fusion", "", 1, 64 + 4, 64, 0)
    # Workspace counts as written: it is.
    gemm = found["custom-call __cublas$gemm"]
    assert gemm == Kernel(
        "custom-call __cublas$gemm", "", 1, 512, 64 + 64, 2 * 4 * 4 * 16, wide=True
    )
    assert found["copyturned"] == Kernel("copy", "turned", 1, 256, 256, 0)
    # Conditions of loops are kernels, too, but for those of loops whose rounds are known.
    assert sum(one.operation == "compare" for one in kernels(TEXT)) == 1


def test_a_step_is_a_round_of_the_last_loop_that_is_not_counted():
    assert {one.operation for one in kernels(TEXT, step=True)} == {"fusion", "compare"}
    whole = TEXT.replace(
        "body=%token", 'body=%token, backend_config={"known_trip_count":{"n":"9"}}'
    )
    assert len(kernels(whole, step=True)) == len(kernels(whole)) == len(kernels(TEXT)) - 1


def test_the_longer_of_moving_and_multiplying_counts():
    kernel = Kernel("fusion", "", 3, 60.0, 40.0, 1000.0)
    assert kernel.seconds(flops=100.0, bandwidth=50.0) == 3 * 10
    assert kernel.seconds(flops=1000.0, bandwidth=50.0) == 3 * 2
    assert replace(kernel, wide=True).seconds(flops=100.0, bandwidth=50.0) == 3 * 20
