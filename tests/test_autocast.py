"""Stretches of code that are kept from modes a caller has set, and leave the modes as they were."""

import pytest
import torch

from path_attention.autocast import with_tf32, without_tf32

CUDA = torch.device("cuda")  # the modes are there without one


@pytest.mark.parametrize("allowed", ["highest", "high"])
def test_without_tf32_gives_back_what_was_allowed(allowed: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        with without_tf32(CUDA):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == allowed
        assert torch.backends.cuda.matmul.allow_tf32 == (allowed == "high")
    finally:
        torch.set_float32_matmul_precision(before)


def test_without_tf32_gives_it_back_after_an_error() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(RuntimeError, match="of the caller"), without_tf32(CUDA):
            raise RuntimeError("of the caller")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("allowed", ["highest", "high"])
def test_with_tf32_within_without_it(allowed: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    matmul = torch.backends.cuda.matmul
    try:
        with without_tf32(CUDA):
            with with_tf32(CUDA):
                assert matmul.fp32_precision == "tf32"
            assert not matmul.allow_tf32
            with pytest.raises(RuntimeError, match="of the caller"), with_tf32(CUDA):
                raise RuntimeError("of the caller")
            assert not matmul.allow_tf32
            with with_tf32(torch.device("cpu")):
                assert not matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("allowed", ["none", "ieee", "tf32"])
def test_with_tf32_gives_back_what_the_newer_interface_has(allowed: str) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = allowed
    try:
        with with_tf32(CUDA):
            assert matmul.fp32_precision == "tf32"
        assert matmul.fp32_precision == allowed
        with without_tf32(CUDA), with_tf32(CUDA):
            assert matmul.fp32_precision == "tf32"
            assert matmul.allow_tf32  # which torch refuses to tell where the interfaces are mixed
        assert matmul.fp32_precision == allowed
    finally:
        matmul.fp32_precision = before
