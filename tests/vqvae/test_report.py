"""Parts of the pages of reports: escaping, charts, and which images are picked."""

import io
import math
import re

import pytest
import torch
from PIL import Image

from priors import NormalPrior, UniformPrior
from vqvae import VQVAE, GaussianVAE, pictures
from vqvae.bound import ELBO
from vqvae.data import Batch
from vqvae.evaluation import ImageBounds, evaluate
from vqvae.metrics import CodeUsage
from vqvae.quantizers import EMAVectorQuantizer, GumbelQuantizer
from vqvae.report import charts
from vqvae.report.curves import Curves
from vqvae.report.figures import Figures, duration, said
from vqvae.report.gallery import EXTREMES, MOST_FIRST, Gallery, of_at_most, thumbnail
from vqvae.report.markup import Markup, element, joined, table
from vqvae.report.run_page import RunContents, run_page

NETWORKS = {"image_size": 8, "width": 8, "num_blocks": 1}


def world(kind):
    """A model, its priors, and ten images in two batches."""
    torch.manual_seed(0)
    if kind == "gaussian":
        model = GaussianVAE(**NETWORKS, dim=2)
        priors = {"normal": NormalPrior(dim=2, grid=model.grid)}
    else:
        quantizer = EMAVectorQuantizer if kind == "codes" else GumbelQuantizer
        model = VQVAE(**NETWORKS, quantizer=quantizer.Config(num_codes=8, dim=4))
        priors = {"uniform": UniformPrior(num_codes=8, grid=model.grid)}
    images = torch.randint(0, 256, (10, model.config.num_channels, 8, 8)).to(torch.uint8)
    return model.eval(), priors, [Batch(images[:6], torch.arange(6) % 3), Batch(images[6:], torch.arange(4) % 3)]


@pytest.mark.parametrize("kind", ["codes", "stochastic", "gaussian"])
def test_the_mean_of_what_images_cost_is_the_bound(kind):
    model, priors, batches = world(kind)
    seen: list[ImageBounds] = []
    gallery = Gallery()

    def observe(each):
        seen.append(each)
        gallery.add(each)

    result = evaluate(model, priors, batches, observe_bounds=observe)
    assert [len(each.images) for each in seen] == [6, 4]
    assert torch.equal(torch.cat([each.labels for each in seen]), torch.cat([each.labels for each in batches]))
    (rate,) = result.bound.rate.values()
    for name, expected in (("rate", rate), ("distortion", result.bound.distortion), ("entropy", result.bound.entropy)):
        found = torch.cat([getattr(each.bound, name) for each in seen]).double().mean().item()
        assert found == pytest.approx(expected, rel=1e-6)
    assert torch.cat([each.psnr for each in seen]).mean().item() == pytest.approx(result.psnr, rel=1e-5)
    total = gallery.rates + gallery.distortions
    assert total.mean().item() == pytest.approx(result.bound.negative_elbo, rel=1e-6)
    # It changes no figure.
    assert evaluate(model, priors, batches).bound == result.bound


def bounds(nats, side=4):
    """A batch of images that cost so much, each of one grey, by which it is known."""
    nats = torch.as_tensor(nats)
    images = torch.arange(len(nats)).view(-1, 1, 1, 1).expand(-1, 1, side, side).to(torch.uint8)
    nothing = torch.zeros(len(nats))
    bound = ELBO(rate=nats * 0.25, distortion=nats * 0.75, entropy=nothing)
    return ImageBounds(images=images, reconstructions=images, labels=None, bound=bound, psnr=nothing + math.inf)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_cheapest_and_the_dearest_are_those_of_all(size):
    nats = torch.randint(0, 40, (64,), generator=torch.Generator().manual_seed(0)).float()  # with equals
    gallery = Gallery()
    for part in nats.split(size):
        gallery.add(bounds(part))
    order = sorted(range(64), key=lambda at: (nats[at].item(), at))
    assert gallery.best.index.tolist() == order[:EXTREMES]
    order = sorted(range(64), key=lambda at: (-nats[at].item(), at))
    assert gallery.worst.index.tolist() == order[:EXTREMES]
    assert gallery.first.index.tolist() == list(range(MOST_FIRST))
    assert torch.equal(gallery.worst.nats, nats.double().sort(descending=True).values[:EXTREMES])
    assert len(gallery) == 64


def test_an_image_of_no_probability_is_the_dearest_and_one_without_a_figure_is_none():
    gallery = Gallery()
    gallery.add(bounds([1.0, math.inf, math.nan, 2.0]))
    assert gallery.best.index.tolist() == [0, 3, 1]
    assert gallery.worst.index.tolist() == [1, 3, 0]
    points = list(zip(gallery.rates.tolist(), gallery.distortions.tolist(), strict=True))
    drawn = charts.scatter("all", [charts.Series("images", points)], "x", "y")
    assert drawn.count("h0") == 2
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_large_images_are_fewer_and_smaller():
    gallery = Gallery()
    gallery.add(bounds([1.0] * 16, side=256))
    assert len(gallery.first) == 4
    png = thumbnail(gallery.first.images[0], 80)
    with Image.open(io.BytesIO(png)) as opened:
        assert opened.size == (80, 80)
    noise = torch.randint(0, 256, (3, 600, 900), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    large = thumbnail(noise, 1000)
    assert len(large) > 1_000_000
    small = of_at_most(large, 100_000)
    assert len(small) <= 100_000
    with Image.open(io.BytesIO(small)) as opened:
        assert opened.width == pytest.approx(1.5 * opened.height, abs=2)
    assert of_at_most(small, 100_000) == small


def test_a_page_of_large_photographs_is_small_enough_to_send():
    """Of noise, which no picture takes more bytes for."""
    generator = torch.Generator().manual_seed(0)
    gallery, usage = Gallery(), CodeUsage(8)
    for _ in range(3):
        images = torch.randint(0, 256, (8, 3, 256, 256), generator=generator).to(torch.uint8)
        nats = torch.rand(8, generator=generator)
        bound = ELBO(rate=nats, distortion=nats, entropy=torch.zeros(8))
        gallery.add(ImageBounds(images=images, reconstructions=images, labels=None, bound=bound, psnr=nats))
    usage.add(torch.arange(8))
    noise = torch.randint(0, 256, (2000, 2600, 3), generator=generator).to(torch.uint8)
    figures = {"images": 24, "skipped": 1, "dims": 3 * 256**2, "rate": {"mine": 4.0}, "distortion": 50.0}
    contents = RunContents(
        name="noise",
        model="a model",
        data="noise",
        figures=Figures(plain=figures),
        gallery=gallery,
        usage=usage,
        samples=pictures.to_png(noise),
        columns=["<i>"],
    )
    page = run_page(contents)
    assert len(page) < 4_000_000
    assert page.count("<img") == 2 * (4 + 10 + 10) + 1
    assert "<i>" not in re.sub("<i class", "", page)
    assert "1 more could not be read" in page


def test_all_but_markup_is_escaped():
    assert element("p", "<b> & \"'") == "<p>&lt;b&gt; &amp; &quot;&#x27;</p>"
    assert element("img", alt='"><script>') == '<img alt="&quot;&gt;&lt;script&gt;">'
    assert element("p", element("b", "<"), None, 3, class_="a", aria_label="b") == (
        '<p class="a" aria-label="b"><b>&lt;</b>3</p>'
    )
    assert element("path", d="M0 0") == '<path d="M0 0"/>'
    assert joined("a\x1b[2J\u202e", Markup("<br>")) == "a?[2J?<br>"
    assert "<script" not in table(["<script>"], [["<script>", "<script>"]], class_="<script>")


def test_a_curve_goes_through_its_points():
    points = [(float(step), float(step) ** 2) for step in range(11)]
    drawn = charts.lines("squares", [charts.Series("one", points)], "step", "nats", is_training=False)
    (path,) = re.findall(r'<path d="M([^"]+)"', drawn)
    placed = [tuple(map(float, each.split())) for each in path.split("L")]
    assert len(placed) == 11
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    bottom, top = charts.HEIGHT - charts.BOTTOM, charts.TOP
    highest = 100 * 1.06
    for (x, y), (step, value) in zip(placed, points, strict=True):
        assert x == pytest.approx(left + step / 10 * (right - left), abs=0.06)
        assert y == pytest.approx(bottom - value / highest * (bottom - top), abs=0.06)
    for text in ("squares", "step", "nats", ">50<", ">100<"):
        assert text in drawn


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    points = [(float(step), 2.0 * step) for step in range(10_001)]
    drawn = charts.lines("long", [charts.Series("one", points)], "step", "nats")
    (path,) = re.findall(r'<path d="M([^"]+)"', drawn)
    placed = [tuple(map(float, each.split())) for each in path.split("L")]
    assert 200 <= len(placed) <= charts.MOST_POINTS
    assert placed[0][0] == charts.LEFT
    assert placed[-1][0] == charts.WIDTH - charts.RIGHT


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 100.0, ["0", "25", "50", "75", "100"]),
        (0.0, 1.0, ["0.00", "0.25", "0.50", "0.75", "1.00"]),
        (-1.0, 1.0, ["−1.0", "−0.5", "0.0", "0.5", "1.0"]),
        (0.0, 3200.0, ["0", "1k", "2k", "3k"]),
        (0.0, 80_000.0, ["0", "20k", "40k", "60k", "80k"]),
        (2.91, 2.93, ["2.910", "2.915", "2.920", "2.925", "2.930"]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert [text for _, text in charts._ticks(low, high)] == expected


def test_a_histogram_counts_all():
    values = [float(each) for each in range(31)] + [math.nan, math.inf]
    drawn = charts.histogram("values", values, "x", "y", num_bins=31)
    heights = [float(each) for each in re.findall(r'<rect [^>]*height="([^"]+)"', drawn)]
    assert len(heights) == 31
    assert len({*heights}) == 1
    assert charts.histogram("none", [math.nan], "x", "y") == ""
    assert charts.lines("none", [charts.Series("a", [])], "x", "y") == ""
    assert "dots" in charts.lines("one", [charts.Series("a", [(1.0, 1.0)])], "x", "y")


def test_curves_are_in_bits(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        f"stage,step,split,name,value\ncodebook,1,train,distortion,{math.log(2)}\nprior,2,test,rate,{math.log(8)}\n"
        "prior,3,test,psnr,20\nprior,3,test,seconds,9\nprior,4,te"
    )
    curves = Curves.read(tmp_path)
    assert curves.stages == ["codebook", "prior"]
    assert curves.points("codebook", "distortion", "train") == [(1.0, pytest.approx(1.0))]
    assert curves.points("prior", "rate", "test") == [(2.0, pytest.approx(3.0))]
    assert curves.names("prior") == (["rate", "psnr"], [])
    assert Curves.read(tmp_path / "nothing").stages == []


def test_figures_and_how_they_are_said():
    plain = {"images": 4, "skipped": 0, "dims": 64, "rate": {"uniform": 9.0, "mine": 4.0}, "distortion": 50.0}
    figures = Figures(plain=plain | {"entropy": 1.0, "negative_elbo": None})
    assert figures.prior == "mine"
    assert figures.rate == 3.0
    assert figures.bits(64 * math.log(2)) == pytest.approx(1.0)
    assert figures.rows()[-1] == ("negative ELBO", None)
    assert figures.nats(None) == ["–", "–"]
    assert said(-1234.5, ",.1f", " dB") == "−1,234.5 dB"
    assert said(math.inf, ".1f") == said("<b>", ".1f") == said(True, ".1f") == "–"
    assert [duration(each) for each in (5, 99, 667, 30_000, None, "x")] == [
        "5 s",
        "99 s",
        "11 min",
        "8 h 20 min",
        "–",
        "–",
    ]
    with pytest.raises(ValueError, match="rate under each prior"):
        Figures(plain=plain | {"rate": {"mine": "4"}})
    with pytest.raises(ValueError, match="'dims'"):
        Figures(plain=plain | {"dims": 0})
