"""The order of samples: one permutation an epoch, or batches of one bucket each."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dist_layerlr.errors import ConfigError
from launch.trainer.batches import empty_prompt, loses_caption
from launch.trainer.data.order import Order, buckets_of, one_batch
from launch.trainer.families import get_family
from launch.trainer.seeds import ORDER_STREAM, mix_seed

BUCKETS = ((0, 3, 4, 9, 10), (1, 2), (5, 6, 7, 8, 11, 12, 13))
"""5, 2 and 7 samples: with 4 a batch 2 + 1 + 2 batches, 20 places for 14 samples."""


class Sized:
    """A data set that knows the size of each sample and nothing else."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def bucket(self, index: int) -> int:
        return self.sizes[index]


def bucket_of(index: int) -> int:
    return next(number for number, members in enumerate(BUCKETS) if index in members)


def batches(order: Order, first: int, count: int, size: int) -> list[list[int]]:
    starts = [first + i * size for i in range(count)]
    return [[order.index(n) for n in range(start, start + size)] for start in starts]


def test_samples_of_one_size_come_in_the_order_that_they_always_had():
    order = Order([tuple(range(7))], seed=3, batch=4)
    for epoch in range(3):
        generator = torch.Generator().manual_seed(mix_seed(3, ORDER_STREAM, epoch))
        expected = torch.randperm(7, generator=generator).tolist()
        assert [order.index(7 * epoch + i) for i in range(7)] == expected
    assert order.filled == 0
    # Whatever the size of a batch and wherever the run begins again.
    other = Order([tuple(range(7))], seed=3, batch=5, begun=12)
    assert [other.index(n) for n in range(40)] == [order.index(n) for n in range(40)]


def test_every_batch_is_of_one_bucket_and_an_epoch_sees_every_sample():
    order = Order(BUCKETS, seed=1, batch=4)
    assert (order.buckets, order.filled) == (3, 6)
    epochs = [batches(order, epoch * 20, 5, 4) for epoch in range(4)]
    for epoch in epochs:
        assert all(len({bucket_of(i) for i in batch}) == 1 for batch in epoch)
        seen = Counter(i for batch in epoch for i in batch)
        assert set(seen) == set(range(14))
        # 5 samples on 8 places, 2 on 4, 7 on 8: none is seen oftener than its bucket's share.
        assert max(seen[i] for i in BUCKETS[1]) == 2 and max(seen[i] for i in BUCKETS[2]) <= 2
    assert len({str(epoch) for epoch in epochs}) == 4
    ranks = [[bucket_of(batch[0]) for batch in epoch] for epoch in epochs]
    assert any(one != sorted(one) for one in ranks), "batches of all buckets are mixed"
    inside = [[i for batch in epoch for i in batch if i in BUCKETS[2]] for epoch in epochs]
    assert any(one[:7] != sorted(one[:7]) for one in inside), "a bucket is shuffled, too"
    assert len({tuple(sorted(batch)) for epoch in epochs for batch in epoch}) > 8


def test_the_order_depends_on_the_seed_and_the_number_alone():
    order, again = (Order(BUCKETS, seed=5, batch=4) for _ in range(2))
    whole = [order.index(n) for n in range(60)]
    # Backwards, as if each number were another rank's.
    assert [again.index(n) for n in reversed(range(60))] == whole[::-1]
    assert whole != [Order(BUCKETS, seed=6, batch=4).index(n) for n in range(60)]


def test_a_run_that_goes_on_with_another_batch_keeps_batches_of_one_bucket():
    begun = 3 * 4  # three steps of 4 samples
    order = Order(BUCKETS, seed=1, batch=5, begun=begun)
    for batch in batches(order, begun, 12, 5):
        assert len({bucket_of(i) for i in batch}) == 1
    # Stopped again after two of these steps: the third process finds the same borders.
    third = Order(BUCKETS, seed=1, batch=5, begun=begun + 2 * 5)
    assert batches(third, begun + 10, 6, 5) == batches(order, begun + 10, 6, 5)
    same = Order(BUCKETS, seed=1, batch=4, begun=begun)
    assert batches(same, begun, 9, 4) == batches(Order(BUCKETS, seed=1, batch=4), begun, 9, 4)


def test_buckets_are_what_the_data_set_says():
    data = Sized(8, 4, 8, 4, 6)
    assert buckets_of(data) == ((0, 2), (1, 3), (4,))
    assert one_batch(data, 4) == (0, 2) and one_batch(data, 1) == (0,) and one_batch(data, 0) == ()
    assert buckets_of(range(3)) == ((0, 1, 2),)


def test_a_tenth_of_the_captions_is_dropped_the_same_ones_on_every_rank():
    numbers = range(20_000)
    dropped = [n for n in numbers if loses_caption(n, seed=4, share=0.1)]
    # Four standard deviations of a binomial: sqrt(20000 * 0.1 * 0.9) = 42.
    assert abs(len(dropped) - 2000) < 170
    assert dropped != [n for n in numbers if loses_caption(n, seed=5, share=0.1)]
    more = {n for n in numbers if loses_caption(n, seed=4, share=0.2)}
    assert more > set(dropped)
    assert not any(loses_caption(n, 4, 0.0) for n in range(1000))
    assert all(loses_caption(n, 4, 1.0) for n in range(1000))


def test_caption_dropout_without_an_empty_prompt_is_refused():
    with pytest.raises(ConfigError, match=r"no empty prompt \(prompt_embeds\); write it with"):
        empty_prompt(Sized(1), get_family("wan"))
