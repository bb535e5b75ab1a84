"""The time of a program from its text, for schedules small enough to be added up by hand."""

import pytest

from llama_jax.parallel.chips import parse_topology
from llama_jax.planning.cost_model import Program, predict, predict_round, sizes

V5P = parse_topology("v5p:4x4x4")
MILLISECOND = int(V5P.chip.clock / 1000)  # cycles
GATHERED = int(3 * V5P.chip.link / 1000)  # bytes that all links together bring in a millisecond


def program(body: str, entry: str = "") -> str:
    """A loop of ten rounds over a body, and what follows it."""
    return f"""HloModule jit_step, is_scheduled=true

%sparse (p: bf16[8]) -> bf16[{GATHERED // 2}] {{
  %p = bf16[8]{{0}} parameter(0)
  ROOT %all-gather.9 = bf16[{GATHERED // 2}]{{0}} all-gather(%p), replica_groups=[1,64]<=[64], dimensions={{0}}
}}

%condition (c: (s32[], f32[8])) -> pred[] {{
  %c = (s32[], f32[8]{{0}}) parameter(0)
  %ten = s32[] constant(10)
  ROOT %lt = pred[] compare(%i, %ten), direction=LT
}}

%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %b = (s32[], f32[8]{{0}}) parameter(0)
{body}
  ROOT %out = (s32[], f32[8]{{0}}) tuple(%i, %x)
}}

ENTRY %main (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  %while.1 = (s32[], f32[8]{{0}}) while(%start), condition=%condition, body=%body
{entry}
  ROOT %result = f32[8]{{0}} get-tuple-element(%while.1), index=1
}}
"""


def fused(name: str, milliseconds: float) -> str:
    cycles = int(milliseconds * MILLISECOND)
    return (
        f"  %{name} = f32[8]{{0}} fusion(%b), kind=kLoop, calls=%f, "
        f'backend_config={{"estimated_cycles":"{cycles}"}}'
    )


def ms(seconds: float) -> float:
    return pytest.approx(seconds / 1000, rel=1e-6)


def test_loops_count_as_often_as_they_run():
    found = predict(program(fused("x", 3), fused("y", 5)), V5P, 0.0)
    assert (found.compute, found.simulated, found.unknown_loops) == (ms(35), ms(35), 0)


@pytest.mark.parametrize(
    ("kind", "stride", "rounds"), [("s32", 2, 5), ("u32", 4, 3), ("s32", 1, 10)]
)
def test_a_loop_may_count_in_strides(kind, stride, rounds):
    """As those that add up a gradient around a ring of chips, two pieces a round."""
    counted = f"  %by = {kind}[] constant({stride})\n  %i = {kind}[] add(%before, %by)"
    text = program(f"{fused('x', 3)}\n{counted}").replace("%ten = s32[]", f"%ten = {kind}[]")
    text = text.replace("  ROOT %lt", f"  %i = {kind}[] get-tuple-element(%c), index=0\n  ROOT %lt")
    found = predict(text, V5P, 0.0)
    assert (found.compute, found.unknown_loops) == (ms(3 * rounds), 0)


def test_a_loop_of_unknown_length_is_told():
    text = program(fused("x", 3)).replace("%ten = s32[] constant(10)", "%ten = s32[] parameter(1)")
    assert predict(text, V5P, 0.0).unknown_loops == 1


def test_a_synchronous_gather_is_waited_for():
    gather = (
        f"  %g = bf16[{GATHERED // 2}]{{0}} all-gather(%x), replica_groups=[1,64]<=[64], "
        "dimensions={0}"
    )
    found = predict(program(f"{fused('x', 3)}\n{gather}"), V5P, 0.0)
    assert (found.compute, found.exposed, found.simulated) == (ms(30), ms(10), ms(40))
    assert found.collectives == {"synchronous all-gather": 10}
    assert found.moved["synchronous all-gather"] == pytest.approx(10 * GATHERED, rel=1e-6)
    whole = predict(
        program(f"{fused('x', 3)}\n{gather.replace('all-gather', 'all-reduce')}"), V5P, 0.0
    )
    assert whole.exposed == ms(20)  # a sum goes round twice


@pytest.mark.parametrize(("beside", "waited"), [(3, 0), (0.25, 0.75)])
def test_an_asynchronous_gather_hides_behind_products(beside, waited):
    started = (
        f"  %s = ((bf16[8]{{0}}), bf16[{GATHERED // 2}]{{0}}) call-start(%x), to_apply=%sparse"
    )
    updated = "  %u = u32[] call-update(%s)"
    done = f"  %d = bf16[{GATHERED // 2}]{{0}} call-done(%u)"
    found = predict(program("\n".join([started, updated, fused("x", beside), done])), V5P, 0.0)
    assert (found.compute, found.exposed, found.simulated) == (
        ms(10 * beside),
        0,
        ms(10 * (beside + waited)),
    )


@pytest.mark.parametrize(("beside", "waited"), [(3, 0), (0.25, 0.75)])
def test_a_gather_that_goes_on_inside_of_products_hides_behind_them(beside, waited):
    """As on TPUs without a core for transfers: begun, gone on with in a product, awaited, with the
    gather in each of them.
    """
    gather = (
        f"  %g = bf16[{GATHERED // 2}]{{0}} all-gather(%p), replica_groups=[1,64]<=[64], "
        'frontend_attributes={chain_id="3"}'
    )
    inside = {
        "begin": '  ROOT %c = (bf16[8]) custom-call(%g), custom_call_target="AsyncCollectiveStart"',
        "go_on": "  ROOT %c = (f32[8], bf16[8]) tuple(%convolution, %g)",
        "end": '  ROOT %c = bf16[8] custom-call(%g), custom_call_target="AsyncCollectiveDone"',
    }
    called = "\n".join(
        f"%{name} (p: bf16[8]) -> bf16[8] {{\n{gather}\n{root}\n}}\n"
        for name, root in inside.items()
    )
    lines = [
        "  %s = (bf16[8]{0}, u32[]) fusion(%x), kind=kCustom, calls=%begin",
        fused("y", beside).replace("calls=%f", "calls=%go_on"),
        "  %d = bf16[8]{0} fusion(%get-tuple-element.1), kind=kCustom, calls=%end",
    ]
    found = predict(f"{called}\n{program(chr(10).join(lines))}", V5P, 0.0)
    assert (found.compute, found.exposed, found.simulated) == (
        ms(10 * beside),
        0,
        ms(10 * (beside + waited)),
    )
    assert found.collectives == {"asynchronous all-gather": 10}


@pytest.mark.parametrize(("beside", "waited"), [(0, 4), (3, 1), (5, 0)])
def test_slices_add_up_beside_the_products(beside, waited):
    """Of two slices each sends its part once there and once back; the network has no time for
    anything else meanwhile.
    """
    pod = parse_topology("2xv5p:4x4x4")
    size = int(2 * pod.chip.network / 1000)
    meeting = 'frontend_attributes={_xla_host_transfer_rendezvous="sum"}'
    lines = [
        *[
            f"  %s{i} = (bf16[{size // 2}]{{0}}, u32[], token[]) send(%a, %t), "
            f"{meeting.replace('sum', f'{i}')}"
            for i in (1, 2)
        ],
        f"  %r = (bf16[{size // 2}]{{0}}, u32[], token[]) recv(%t), {meeting.replace('sum', '2')}",
        fused("beside", beside),
        "  %d = (bf16[8]{0}, token[]) recv-done(%r), channel_id=1",
    ]
    found = predict(program(fused("x", 3), "\n".join(lines)), pod, 0.0)
    assert (found.compute, found.simulated) == (ms(30 + beside), ms(30 + beside + waited))
    assert found.collectives == {"sum between slices": 2}
    assert found.moved["sum between slices"] == pytest.approx(2 * size, rel=1e-6)


def test_one_branch_of_a_conditional_counts_in_one_round_of_the_loop():
    branches = "\n".join(f"%b{i} (c: f32[8]) -> f32[8] {{\n{fused('y', i)}\n}}\n" for i in (1, 4))
    condition = "  %c = (f32[8]{0}) conditional(%p, %x, %x), branch_computations={%b1, %b4}"
    text = program(f"{fused('x', 3)}\n{condition}", fused("after", 7)).replace(
        "%body (", f"{branches}\n%body (", 1
    )
    assert predict(text, V5P, 0.0).compute == ms(77)
    rounds = [predict_round(text, V5P, longest) for longest in (False, True)]
    assert [(found.compute, found.simulated) for found in rounds] == [
        (ms(4), ms(4)),
        (ms(7), ms(7)),
    ]


@pytest.mark.parametrize(("beside", "seconds"), [(1, 6), (8, 8)])
def test_what_is_brought_on_ahead_takes_turns_on_the_memory(beside, seconds):
    size = int(3 * V5P.chip.bandwidth / 1000)
    fetches = [
        f"  %c1 = (s8[{size}]{{0:S(1)}}, s8[{size}]{{0}}, u32[]) copy-start(%x)",
        f"  %c2 = ((s8[{4 * size}]{{0}}), s8[{size}]{{0:S(1)}}, s32[]) slice-start(%x), "
        "slice={[0:1]}",
        fused("y", beside),
        *[
            f"  %d{i} = s8[{size}]{{0:S(1)}} {kind}-done(%c{i})"
            for i, kind in ((1, "copy"), (2, "slice"))
        ],
    ]
    text = program("\n".join(fetches))
    assert predict_round(text, V5P).simulated == ms(seconds)
    assert predict(text, V5P, 0.0).simulated == ms(10 * beside)


def test_kernels_of_attention_are_priced_by_their_products():
    kernels = [
        f'  %splash_{kind}.1 = bf16[8]{{0}} custom-call(%x), custom_call_target="tpu_custom_call"'
        for kind in ("mha_fwd_residuals", "mha_dq", "mha_dkv")
    ]
    found = predict(
        program("\n".join(kernels)), V5P, attention_product=V5P.chip.peak * 0.6
    )  # a second for each product
    assert (found.forward_kernels, found.backward_kernels) == (10, 10)
    assert found.attention == found.simulated == pytest.approx(7)


def test_large_copies_in_loops_are_listed():
    copy = "  %copy.7 = bf16[1048576]{0} copy(%x)"
    assert predict(program(copy, copy.replace(".7", ".8")), V5P, 0.0).copies == {
        "copy bf16[1048576]{0}": 10
    }
    assert not predict(program(copy.replace("1048576", "1024")), V5P, 0.0).copies


def test_shares_are_of_the_peak():
    found = predict(program(fused("x", 3)), V5P, 0.0)
    assert found.shares(0.015 * V5P.chip.peak, V5P.chip.peak) == pytest.approx((0.5, 0.5, 0.5))


def test_text_is_read():
    assert sizes("(f32[2,3]{1,0:T(8,128)}, bf16[], s4[10]{0})") == [24, 2, 5]
    groups = [
        ("replica_groups=[4,16]<=[64]", 16),
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("no groups", 0),
        ("replica_groups=mesh['fsdp'=32,'tensor'=2] {'fsdp'}", 32),
    ]
    for words, size in groups:
        text = f"ENTRY %e (a: f32[8]) -> f32[8] {{\n  %r = f32[8]{{0}} all-reduce(%a), {words}\n}}"
        assert Program(text).computations["e"][0].group == size, words
