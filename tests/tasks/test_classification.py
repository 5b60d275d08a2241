import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from patchscale.errors import UserError
from patchscale.tasks.classification import Classification


class Fixed(nn.Module):
    """A model whose logits are its input's first row."""

    def forward(self, x):
        return x[:, 0, 0]


def batch(count=40, classes=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 1, classes, generator=generator), torch.randint(classes, (count,), generator=generator)


def test_scores_are_the_metrics_by_their_definition():
    images, labels = batch()
    logits = images[:, 0, 0]
    order = logits.argsort(dim=1, descending=True)
    scores = Classification(10).evaluate(Fixed(), [(images[:7], labels[:7]), (images[7:], labels[7:])])
    assert scores.top1 == pytest.approx(100 * (order[:, 0] == labels).double().mean().item())
    assert scores.top5 == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).double().mean().item())
    assert scores.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert scores.images == 40


def test_images_whose_logits_are_no_numbers_are_wrong_and_make_the_loss_none():
    """Whatever their labels: as those of a model that has diverged."""
    images, labels = batch(classes=3)
    whole = Classification(3).evaluate(Fixed(), [(images, labels)])
    images[5:25], images[25:30, ..., 2] = math.nan, math.nan
    batches = [(images[:8], labels[:8]), (images[8:16], labels[8:16]), (images[16:], labels[16:])]
    scores = Classification(3).evaluate(Fixed(), batches)
    right = images[:, 0, 0].nan_to_num().argmax(1) == labels
    assert scores.top1 == pytest.approx(100 * (right[:5].sum() + right[30:].sum()).item() / 40)
    assert scores.top5 == pytest.approx(100 * 15 / 40)
    assert math.isnan(scores.loss)
    assert math.isfinite(whole.loss)


def test_with_fewer_than_five_classes_top5_is_complete():
    images, labels = batch(classes=3)
    assert Classification(3).evaluate(Fixed(), [(images, labels)]).top5 == 100


def test_evaluation_leaves_the_model_in_its_mode():
    model = Fixed().train()
    Classification(10).evaluate(model, [batch()])
    assert model.training


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(UserError, match="no readable image"):
        Classification(10).evaluate(Fixed(), [])


def test_smoothing_is_timms():
    images, labels = batch()
    ours = Classification(10, smoothing=0.1).loss(Fixed(), images, labels)
    assert ours.item() == pytest.approx(LabelSmoothingCrossEntropy(0.1)(images[:, 0, 0], labels).item(), rel=1e-5)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_targets_are_distributions_and_the_loss_is_their_cross_entropy(mixup, cutmix):
    images, labels = torch.randn(8, 3, 4, 10), torch.randint(10, (8,))
    np.random.seed(0)
    task = Classification(10, smoothing=0.1, mixup=mixup, cutmix=cutmix)
    mixed, targets = task.augment(images.clone(), labels)
    assert targets.shape == (8, 10)
    assert torch.allclose(targets.sum(1), torch.ones(8))
    # A smoothed target keeps smoothing / classes everywhere, whatever the mix.
    assert targets.min() == pytest.approx(0.01)
    assert not torch.equal(mixed, images)
    ours = task.loss(Fixed(), mixed, targets)
    assert ours.item() == pytest.approx(SoftTargetCrossEntropy()(mixed[:, 0, 0], targets).item(), rel=1e-5)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("mixup_batch", [None, 2])
def test_the_last_of_an_odd_number_of_images_is_not_mixed(count, mixup_batch):
    images, labels = torch.randn(count, 3, 4, 4), torch.randint(10, (count,))
    task = Classification(10, smoothing=0.1, mixup=0.8, mixup_batch=mixup_batch)
    mixed, targets = task.augment(images.clone(), labels)
    assert len(mixed) == len(targets) == count
    assert torch.equal(mixed[-1], images[-1])
    assert not any(torch.equal(*pair) for pair in zip(mixed[:-1], images[:-1], strict=True))
    torch.testing.assert_close(targets[-1], 0.9 * F.one_hot(labels[-1], 10) + 0.01)


@pytest.mark.parametrize("bad", [{"smoothing": 1.0}, {"smoothing": -0.1}, {"mixup": -1.0}])
def test_bad_values_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Classification(10, **bad)


def test_binary_cross_entropy_is_timms_on_plain_labels():
    from timm.loss import BinaryCrossEntropy

    images, labels = batch()
    for smoothing in (0.0, 0.1):
        ours = Classification(10, smoothing=smoothing, loss="bce").loss(Fixed(), images, labels)
        timms = BinaryCrossEntropy(smoothing)(images[:, 0, 0], labels)
        assert ours.item() == pytest.approx(timms.item(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_binary_cross_entropy_counts_the_classes_of_a_mixed_image_and_no_others(smoothing, mixup, cutmix):
    labels = torch.tensor([0, 1, 2, 2, 3, 4])
    np.random.seed(4)  # a draw that leaves something of both images
    task = Classification(10, smoothing=smoothing, mixup=mixup, cutmix=cutmix, loss="bce")
    mixed, targets = task.augment(torch.randn(6, 3, 4, 10), labels)
    present = torch.zeros(6, 10)
    present[range(6), labels] = 1
    present[range(6), labels.flip(0)] = 1
    assert ((targets > 0) == (present > 0)).all()
    wanted = present * (1 - smoothing) + smoothing / 10
    logits = mixed[:, 0, 0]
    expected = -(wanted * F.logsigmoid(logits) + (1 - wanted) * F.logsigmoid(-logits)).mean()
    assert task.loss(Fixed(), mixed, targets).item() == pytest.approx(expected.item(), rel=1e-5)


def test_images_are_mixed_in_groups_that_draw_for_themselves():
    images, labels = torch.arange(8.0)[:, None, None, None].repeat(1, 3, 4, 4), torch.arange(8)
    np.random.seed(0)
    _, targets = Classification(8, mixup=0.8, mixup_batch=4).augment(images.clone(), labels)
    partners = [sorted(row.nonzero().flatten().tolist()) for row in targets]
    assert partners == [[0, 3], [1, 2], [1, 2], [0, 3], [4, 7], [5, 6], [5, 6], [4, 7]]
    shares = targets[range(8), labels]
    assert len(set(shares[:4].tolist())) == len(set(shares[4:].tolist())) == 1
    assert shares[0] != shares[4]


@pytest.mark.parametrize("bad", [{"mixup_batch": 3}, {"loss": "mse"}])
def test_bad_options_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Classification(10, **bad)


def test_float64_logits_are_not_rounded():
    images, labels = batch()
    images = images.double()
    assert Classification(10).loss(Fixed(), images, labels).dtype == torch.float64
    assert Classification(10).loss(Fixed(), images.bfloat16(), labels).dtype == torch.float32
