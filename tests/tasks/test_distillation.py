import pytest
import torch
import torch.nn.functional as F
from torch import nn

from patchscale.errors import UserError
from patchscale.tasks.classification import Classification
from patchscale.tasks.distillation import Distillation, Teacher

SAME = ((0.0,) * 3, (1.0,) * 3)


class Rows(nn.Module):
    """Logits are the image's first row, of the first channel, times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return x[:, 0, 0] * self.factor


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 4, 4, generator=generator), torch.randint(4, (6,), generator=generator)


def test_soft_is_the_divergence_at_a_temperature_by_its_definition():
    images, labels = batch()
    task = Classification(4, distillation=Distillation(Teacher(Rows(-2.0), SAME, SAME), "soft", alpha=0.3, tau=3.0))
    logits = images[:, 0, 0]
    p, q = (-2 * logits / 3).softmax(1), (logits / 3).softmax(1)
    divergence = 9 * (p * (p.log() - q.log())).mean()  # over images and classes, as published
    expected = 0.7 * F.cross_entropy(logits, labels) + 0.3 * divergence
    assert task.loss(Rows(), images, labels).item() == pytest.approx(expected.item(), rel=1e-5)


def test_hard_is_the_cross_entropy_to_the_teachers_class():
    images, labels = batch()
    task = Classification(4, distillation=Distillation(Teacher(Rows(-2.0), SAME, SAME), "hard"))
    logits = images[:, 0, 0]
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits, logits.argmin(1))) / 2
    assert task.loss(Rows(), images, labels).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_that_answers_twice_gives_its_second_answer_to_the_teacher():
    class Twice(nn.Module):
        def forward(self, x):
            return x[:, 0, 0], x[:, 1, 1]

    images, labels = batch()
    task = Classification(4, distillation=Distillation(Teacher(Rows(-2.0), SAME, SAME), "hard"))
    taught = images[:, 0, 0].argmin(1)
    expected = (F.cross_entropy(images[:, 0, 0], labels) + F.cross_entropy(images[:, 1, 1], taught)) / 2
    assert task.loss(Twice(), images, labels).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_teacher_sees_the_image_as_it_was_trained_to_and_learns_nothing():
    seen = []

    class Looks(nn.Linear):
        def forward(self, x):
            seen.append(x)
            return super().forward(x.mean((2, 3)))

    model = Looks(3, 4).train()
    student, own = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    teacher = Teacher(model, student, own, (8, 8))
    raw = torch.rand(2, 3, 1, 1)  # one colour: resizing cannot change it
    mean, std, own_mean, own_std = (torch.tensor(v)[:, None, None] for v in (*student, *own))
    logits = teacher(((raw - mean) / std).expand(2, 3, 4, 4))
    assert seen[0].shape == (2, 3, 8, 8)
    assert torch.allclose(seen[0], ((raw - own_mean) / own_std).expand(2, 3, 8, 8), atol=1e-5)
    assert not logits.requires_grad
    assert not model.training


@pytest.mark.parametrize(
    ("arguments", "message"), [(("loud",), "'loud'"), (("soft", 1.5), "alpha"), (("soft", 0.5, 0.0), "tau")]
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Distillation(Rows(), *arguments)
