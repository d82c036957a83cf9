"""Each sparse gradient backend against the dense product in fp64."""

import pytest
import torch

from speft_ds.kernels import BACKENDS, choose_backend, make_backend


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 1), (1, 33), (37, 53), (3000, 1031)])
@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
def test_backend_equals_the_dense_gradient(name, dtype, shape, density):
    generator = torch.Generator().manual_seed(0)
    out_features, in_features = shape
    numel = out_features * in_features
    count = round(density * numel)
    index = torch.randperm(numel, generator=generator)[:count].sort().values.to(torch.int32)
    x = torch.randn(19, in_features, generator=generator).to(dtype)
    grad_y = torch.randn(19, out_features, generator=generator).to(dtype)
    expected = (grad_y.double().t() @ x.double()).view(-1)[index.long()]
    values = make_backend(name, index, shape)(x, grad_y)
    assert values.dtype == torch.float32 and values.shape == (count,)
    assert torch.allclose(values.double(), expected, atol=1e-4)


def test_auto_is_by_device_and_density():
    assert choose_backend("auto", 0.005, torch.device("cpu")) == "sampled"
    assert choose_backend("auto", 0.5, torch.device("cpu")) == "dense"
    assert choose_backend("auto", 0.005, torch.device("cuda")) == "dense"
    assert choose_backend("dense", 0.005, torch.device("cpu")) == "dense"
