"""ALiBi slopes equal the references' for every number of heads that models use."""

import math

import numpy as np
import pytest

from jaxinfer.nn.alibi import falcon_slopes, mpt_slopes

HEADS = [1, 2, 3, 6, 8, 12, 14, 16, 32, 40, 64, 71, 128]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("bias_max", [8, 16])
def test_mpt_slopes_equal_the_reference(heads, bias_max):
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt")
    bias = mpt.build_mpt_alibi_tensor(heads, 2, bias_max).numpy()  # [N, 1, 2]: -slope, 0
    np.testing.assert_allclose(mpt_slopes(heads, bias_max), -bias[:, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("heads", HEADS)
def test_falcon_slopes_equal_the_reference(heads):
    torch = pytest.importorskip("torch")
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    mask = torch.ones((1, 2), dtype=torch.long)
    bias = falcon.build_alibi_tensor(mask, heads, torch.float32).numpy()  # [N, 1, 2]: 0, slope
    np.testing.assert_allclose(falcon_slopes(heads, 64), bias[:, 0, 1] / math.sqrt(64), rtol=1e-6)
