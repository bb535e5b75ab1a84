"""Options of the compiler: what it does not know is left out, what it refuses for another reason is
not.
"""

import jax
import pytest

from llama_jax.parallel.compiler import accepted, training_options
from llama_jax.parallel.mesh import make_mesh


def test_unknown_options_are_left_out():
    known, unknown = (
        ("xla_gpu_cuda_data_dir", "nowhere"),
        ("xla_no_such_option_of_any_compiler", "true"),
    )
    assert accepted((known, unknown), jax.devices()[0]) == dict([known])
    assert accepted((unknown,), jax.devices()[0]) == {}


def test_other_errors_are_not_hidden():
    with pytest.raises(jax.errors.JaxRuntimeError):
        accepted((("xla_cpu_enable_fast_math", "perhaps"),), jax.devices()[0])


def test_none_on_cpus():
    assert training_options(make_mesh(devices=jax.devices()[:1])) == {}
