import json

import pytest
import torch

from patchscale.data.sampling import EpochSampler, draw_patch_size, order_of


def cases(parity):
    recorded = json.loads(parity("repeated_aug.json").read_text())
    for name, expected in recorded.items():
        if name.startswith("n") and name != "note":
            images, processes, epoch, rank, *what = name.split("_")
            numbers = [int(part.lstrip("nworldepchak")) for part in (images, processes, epoch, rank)]
            yield numbers, (what or ["all"])[0], expected


def test_repeated_augmentation_draws_the_published_lists(parity):
    compared = 0
    for (images, processes, epoch, rank), what, expected in cases(parity):
        found = order_of(images, epoch, repeats=3, processes=processes, rank=rank)
        if images < 256:
            # The published sampler draws nothing here, and its first epoch dies.
            assert expected == []
            assert len(found) == images // processes
            continue
        assert (len(found) if what == "len" else found[:20] if what == "first20" else found) == expected
        compared += 1
    assert compared == 18


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_draw_what_one_draws_step_by_step(repeats, processes):
    batch = 8  # a process
    whole = order_of(1000, 7, seed=3, repeats=repeats)
    parts = [order_of(1000, 7, seed=3, repeats=repeats, processes=processes, rank=r) for r in range(processes)]
    together = batch * processes
    for step in range(len(whole) // together):
        drawn = [i for part in parts for i in part[step * batch : (step + 1) * batch]]
        assert sorted(drawn) == sorted(whole[step * together : (step + 1) * together])


def test_each_image_is_drawn_once_without_repeats_and_three_times_in_a_row_with():
    assert sorted(order_of(1000, 0)) == list(range(1000))
    drawn = order_of(1000, 0, repeats=3)
    assert len(drawn) == 768
    assert len(set(drawn)) == 256
    assert drawn[0::3] == drawn[1::3] == drawn[2::3]


def test_the_order_follows_from_seed_and_epoch():
    orders = {(seed, epoch): tuple(order_of(300, epoch, seed)) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    assert orders[2, 1] == tuple(order_of(300, 1, 2))
    assert orders[0, 2] == tuple(torch.randperm(300, generator=torch.Generator().manual_seed(2)).tolist())


def test_every_draw_has_a_seed_of_its_own_that_follows_from_its_place():
    sampler = EpochSampler(300, seed=1, repeats=3)
    draws = list(sampler)
    assert len(sampler) == len(draws) == 256
    assert len({draw.seed for draw in draws}) == 256
    assert draws == list(sampler)
    sampler.go_to(1)
    assert not {draw.seed for draw in sampler} & {draw.seed for draw in draws}
    halves = [list(EpochSampler(300, seed=1, repeats=3, processes=2, rank=r)) for r in (0, 1)]
    assert [d for pair in zip(*halves, strict=True) for d in pair] == draws


def test_patch_sizes_are_drawn_alike_by_every_process_and_evenly():
    sizes = (8, 4, 2, 1)
    drawn = [draw_patch_size(sizes, seed, epoch, step) for seed in (0, 1) for epoch in (1, 2) for step in range(1, 301)]
    assert drawn == [
        draw_patch_size(sizes, seed, epoch, step) for seed in (0, 1) for epoch in (1, 2) for step in range(1, 301)
    ]
    counts = [drawn.count(size) for size in sizes]
    assert sum(counts) == 1200
    assert all(240 < count < 360 for count in counts)  # 300, give or take four standard deviations
    assert drawn[:300] != drawn[300:600] != drawn[600:900]
    assert draw_patch_size((), 0, 1, 1) is None
