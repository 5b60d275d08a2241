import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA

from patchscale.tasks.token_picture import principal_components, token_picture


def test_components_are_sklearns_up_to_sign_and_scale():
    features = torch.randn(16, 5, 7, generator=torch.Generator().manual_seed(0))
    ours = principal_components(features).flatten(1).double().numpy()
    theirs = PCA(3).fit_transform(features.flatten(1).t().double().numpy()).T
    for a, b in zip(ours, theirs, strict=True):
        assert abs(np.corrcoef(a, b)[0, 1]) > 0.99999
    assert ours.min() == 0
    assert ours.max() == 1


def test_tokens_that_are_all_alike_are_grey():
    assert torch.equal(principal_components(torch.ones(4, 3, 3)), torch.full((3, 3, 3), 0.5))


def test_a_single_token_is_grey():
    assert torch.equal(principal_components(torch.randn(4, 1, 1)), torch.full((3, 1, 1), 0.5))


def test_picture_shows_the_image_and_one_square_a_token():
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    features = torch.zeros(8, 1, 2)
    features[0, 0, 0] = 1
    picture = np.asarray(token_picture(image, features, side=80))
    assert picture.shape == (40, 160, 3)
    assert (picture[:, :80] == (255, 0, 0)).all()
    left, right = picture[:, 80:120], picture[:, 120:]
    assert (left == left[0, 0]).all()
    assert (right == right[0, 0]).all()
    assert (left[0, 0] != right[0, 0]).any()
