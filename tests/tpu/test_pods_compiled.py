"""Configs for pods, compiled as `train.py` builds them, with two of their layers: a part of `make
presets`, which takes hours.

Asserted is that the step compiles with the mesh of its slice, that its state is updated in place,
that no gradient of a layer's weight is summed whole on every chip (but on v5e, where the compiler
does so), and that the closed form of these layers is near the compiler's memory. That the whole
model fits is shown by `make presets` alone.
"""

import functools
import pathlib
import sys

import pytest
from compiled import summed_weights

from llama_jax.planning.compile import Compiled
from llama_jax.planning.job import Job
from llama_jax.planning.plan import make_plan

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
from tpu_presets import PODS, compile_preset, tpu_configs

pytest.importorskip("libtpu", reason="the compiler for TPUs; `make test-tpu` installs it")
pytestmark = [
    pytest.mark.tpu,
    pytest.mark.timeout(1800),
]  # ten minutes each where two cores were shared by six

BOUND = 0.1  # of the compiler's memory, by which the closed form may be wrong for two layers
NAMES = ("llama-7b-v5p-32", "llama-7b-v5e-64")


@functools.cache
def preset(name: str) -> tuple[Job, Compiled]:
    return compile_preset(PODS / f"{name}.yaml", layers=2)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_is_updated_in_place(name):
    compiled = preset(name)[1]
    assert compiled.aliased > 0.95 * compiled.arguments


@pytest.mark.parametrize("name", NAMES)
def test_two_layers_need_what_the_closed_form_says(request, name):
    if name == "llama-7b-v5e-64":
        reason = (
            "with two layers, where head and embedding decide, the closed form is 16 % too "
            "large; with all 32 within 1 %"
        )
        request.applymarker(pytest.mark.xfail(reason=reason))
    job, compiled = preset(name)
    assert make_plan(job).memory.total == pytest.approx(
        compiled.arguments + compiled.temporaries, rel=BOUND
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_of_a_layer_is_summed_whole(request, name):
    if name == "llama-7b-v5e-64":
        reason = (
            "over all chips of a v5e slice libtpu 0.0.50 sums gradients, whatever is asked "
            "for: docs/log.md"
        )
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    assert summed_weights(preset(name)[1].text) == []


def test_all_configs_for_tpus_are_found():
    assert len(tpu_configs()) == 20
