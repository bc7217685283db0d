import torch

from ospo_fast import _C


def thresholds(maps: torch.Tensor, threads: int) -> torch.Tensor:
    out = torch.full((len(maps),), torch.nan)
    _C.otsu_threshold(maps.data_ptr(), out.data_ptr(), len(maps), maps[0].numel(), 256, threads)
    return out


def codes(cond: torch.Tensor, uncond: torch.Tensor, seeds: torch.Tensor, threads: int) -> torch.Tensor:
    steps, out = torch.full_like(seeds, 5), torch.full_like(seeds, -7)
    pointers = (tensor.data_ptr() for tensor in (cond, uncond, seeds, steps, out))
    _C.sample_codes(*pointers, *cond.shape, 5.0, 1.0, threads)
    return out


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    maps = torch.rand(37, 23, 29)
    assert torch.equal(thresholds(maps, 1), thresholds(maps, 3))
    cond, uncond, seeds = torch.randn(37, 1021), torch.randn(37, 1021), torch.randint(2**62, (37,))
    assert torch.equal(codes(cond, uncond, seeds, 1), codes(cond, uncond, seeds, 3))


def test_a_map_without_threshold_leaves_the_others_alone() -> None:
    maps = torch.rand(6, 8, 8)
    maps[0, 3, 3] = torch.nan
    maps[1, 7, 7] = torch.inf
    maps[2] = torch.tensor([3e38, -3e38]).repeat(32).view(8, 8)  # a range beyond float32
    maps[3] = torch.tensor([1.0, 1.0 + 2**-23]).repeat(32).view(8, 8)  # too small a range for 256 bins
    out = thresholds(maps, 2)
    assert out[:4].isnan().all()
    assert torch.equal(out[4:], thresholds(maps[4:].clone(), 1))
    assert not out[4:].isnan().any()


def test_versions_of_driver_and_runtime() -> None:
    versions = _C.cuda_versions()
    assert (versions is not None) == _C.build_info()["cuda"]
    if versions is not None:
        driver, runtime = versions
        assert runtime >= 11000
        assert driver == 0 or driver >= 11000
