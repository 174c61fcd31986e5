"""Training for the eye: its terms, its discriminator, resuming, and a decoder by itself."""

import csv
import json

import pytest
import torch
from run_files import finish, start, stopped, weights, without
from torch.nn import functional as F

from vqvae import VQVAE
from vqvae.fingerprint import of_tokenizer
from vqvae.looks import discriminator
from vqvae.training.looks_objective import Rival
from vqvae.training.options import LooksConfig

TERMS = ["--looks.l1", "0.5", "--looks.perceptual", "1", "--looks.adversarial", "0.1"]
RIVAL = ["--looks.start", "2", "--looks.ramp", "3", "--looks.width", "8", "--looks.num-halvings", "1"]


@pytest.fixture
def looking(options):
    """The small run at 16x16, for the eye too; the codebook alone."""
    small = [*without("--model.image-size", options), "--model.image-size", "16"]
    return [*small, "--stage", "codebook", *TERMS, *RIVAL]


def figures(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return {(int(step), split, name): float(value) for _, step, split, name, value in rows}


def test_terms_are_in_the_objective_and_the_discriminator_joins_in(run, looking, tmp_path):
    run(*looking)
    found = figures(tmp_path / "run")
    first, last = (
        {name: value for (step, split, name), value in found.items() if (step, split) == (at, "train")} for at in (1, 8)
    )
    assert "adversarial" not in first
    assert 0 < found[8, "test", "perceptual_distance"] < 4
    assert {
        "l1",
        "perceptual",
        "adversarial",
        "adaptive_weight",
        "model/gradient",
        "discriminator/real",
        "discriminator/fake",
    } <= last.keys()
    for each in (first, last):
        parts = sum(each.get(name, 0) for name in ("distortion", "commitment", "l1", "perceptual", "adversarial"))
        assert each["objective"] == pytest.approx(parts, rel=1e-5)
    assert last["adaptive_weight"] > 0
    assert 0 < first["l1"] < 0.5
    # What is for the eye is in no weights but the model's own.
    plain = tmp_path / "plain"
    run(*looking[: -len(TERMS + RIVAL)], "--run", plain)
    states = [torch.load(folder / "state" / "codebook.ckpt", weights_only=True) for folder in (plain, tmp_path / "run")]
    assert states[1]["module"].keys() - states[0]["module"].keys() == {"num_updates"}


@pytest.mark.parametrize(
    "extra", [[], ["--codebook-fit.ema", "0.9", "--looks.r1", "0.1", "--looks.loss", "non-saturating"]]
)
def test_resume_after_stops_is_an_uninterrupted_run(run, looking, tmp_path, monkeypatch, extra):
    run(*looking, *extra)
    whole, cut = tmp_path / "whole", tmp_path / "run"
    cut.rename(whole)
    stopped(run, monkeypatch, cut, [*looking, *extra], codebook=(1, 5))
    run("--resume", "--stage", "codebook", "--run", cut)
    assert weights(cut) == weights(whole)
    states = [torch.load(folder / "state" / "codebook.ckpt", weights_only=True) for folder in (cut, whole)]
    for name in ("rival", "rival_optimizer"):
        assert json.dumps(states[0][name], default=tensor_bytes) == json.dumps(states[1][name], default=tensor_bytes)


def tensor_bytes(tensor):
    return tensor.numpy().tobytes().hex()


def test_a_decoder_alone_leaves_codes_as_they_are(run, looking, options, tmp_path, capsys):
    small = looking[: -len(TERMS + RIVAL) - 2]
    run(*small, "--run", tmp_path / "truth")
    run(*looking, "--tokenizer", tmp_path / "truth", "--train", "decoder")
    truth, looks = (VQVAE.from_pretrained(tmp_path / name / "codebook") for name in ("truth", "run"))
    assert of_tokenizer(truth) == of_tokenizer(looks)
    for name, tensor in truth.state_dict().items():
        if name.startswith(("encoder.", "quantizer.")):
            assert torch.equal(tensor, looks.state_dict()[name]), name
    codes = torch.zeros(1, *truth.grid, dtype=torch.int64)
    assert not torch.equal(truth.decode(codes), looks.decode(codes))
    # Both decoders serve the prior, pictures and lossy files of the first.
    pixels = {}
    for name, decoder in (("truth", []), ("looks", ["--decoder", tmp_path / "run"])):
        run("sample", tmp_path / "truth", "--num", "4", *decoder, "-o", tmp_path / f"{name}.png")
        run("reconstruct", tmp_path / "truth", "--num", "4", *decoder, "--output", tmp_path / f"{name}-r.png")
        pixels[name] = [(tmp_path / f"{name}{end}.png").read_bytes() for end in ("", "-r")]
    assert all(one != other for one, other in zip(*pixels.values(), strict=True))
    run("evaluate", tmp_path / "run", "--prior", tmp_path / "truth", "--output", tmp_path / "looks.json")
    rates = [
        json.loads(path.read_text())["rate"] for path in (tmp_path / "looks.json", tmp_path / "truth" / "elbo.json")
    ]
    assert rates[0]["transformer"] == pytest.approx(rates[1]["transformer"], rel=1e-5)


def test_lossy_files_are_shown_by_either_decoder(run, looking, fails, photos, tmp_path):
    pytest.importorskip("constriction")
    small = looking[: -len(TERMS + RIVAL) - 2]
    run(*small, "--run", tmp_path / "truth")
    run(*looking, "--tokenizer", tmp_path / "truth", "--train", "decoder")
    for mode in ("lossy", "lossless"):
        run("compress", tmp_path / "truth", photos, "--mode", mode, "-o", tmp_path / f"{mode}.vq")
    lossy = ["decompress", tmp_path / "truth", tmp_path / "lossy.vq"]
    run(*lossy, "-o", tmp_path / "a")
    run(*lossy, "--decoder", tmp_path / "run", "-o", tmp_path / "b")
    a, b = ([path.read_bytes() for path in sorted((tmp_path / name).rglob("*.png"))] for name in "ab")
    assert len(a) == len(b) > 0
    assert a != b
    lossless = ["decompress", tmp_path / "truth", tmp_path / "lossless.vq", "-o", tmp_path / "c"]
    assert "--decoder" in fails(*lossless, "--decoder", tmp_path / "run")
    VQVAE(image_size=16, width=8, num_blocks=1).save_pretrained(tmp_path / "other")
    assert "decoder of these codes" in fails(*lossy, "--decoder", tmp_path / "other", "-o", tmp_path / "d")


@pytest.mark.slow
def test_two_processes_train_together(looking, tmp_path):
    finish(start(*looking, "--devices", "2", "--accelerator", "cpu"))
    assert VQVAE.from_pretrained(tmp_path / "run" / "codebook")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--looks.start", "8"], "--looks.start 8"),
        (["--looks.l1", "-1"], "--looks.l1"),
        (["--looks.perceptual", "0", "--looks.network", "lite2"], "--looks.perceptual"),
        (["--looks.adversarial", "0"], "--looks.adversarial"),
        (["--looks.width", "9"], "--looks.width 9"),
        (["--looks.num-halvings", "2"], "num-halvings needs images of at least 32x32"),
        (["--looks.num-halvings", "7"], "--looks.num-halvings 7"),
        (["--model.beta", "1"], "--model.beta"),
        (["--train", "decoder"], "--tokenizer"),
        (["--model.image-size", "8"], "at least 16x16"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(fails, looking, tmp_path, words, says):
    assert says in fails(*looking, *words)
    assert not (tmp_path / "run" / "codebook").exists()


def test_what_a_decoder_alone_cannot_be_trained_on_is_told(run, looking, fails, tmp_path):
    small = looking[: -len(TERMS + RIVAL)]
    run(*small, "--run", tmp_path / "truth")
    decoder = [*small, "--tokenizer", tmp_path / "truth", "--train", "decoder"]
    assert "leave out those of the quantizer" in fails(*decoder, "--model.quantizer.commitment-weight", "0.5")
    gaussian = [*without("--model.quantizer.", small), "--latents", "gaussian", "--model.dim", "3"]
    assert "real latents" in fails(*gaussian, "--tokenizer", tmp_path / "truth", "--train", "decoder")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--train", "decoder"], "--train"),
        (["--looks.adversarial", "0"], "--looks.adversarial"),
        (["--looks.width", "16"], "--looks.width"),
    ],
)
def test_a_codebook_that_is_begun_keeps_its_discriminator(run, looking, fails, tmp_path, monkeypatch, words, says):
    stopped(run, monkeypatch, tmp_path / "run", looking, codebook=(3,))
    resume = ["--resume", "--stage", "codebook", "--run", tmp_path / "run"]
    assert f"begun with another {says}" in fails(*resume, *words)
    # More steps do not move where it joined in.
    run(*resume, "--codebook-fit.num-steps", "10")
    assert (10, "train", "adversarial") in figures(tmp_path / "run")


def test_terms_that_have_no_say_beside_a_finished_codebook_are_told(run, looking, fails, tmp_path):
    """What the run has itself is no mistake, given again or not."""
    run(*looking)
    folder, words = tmp_path / "run", [word for word in looking if word not in ("--stage", "codebook")]
    before = sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())
    line = fails("--stage", "prior", "--run", folder, "--looks.l1", "0.25")
    assert "got --looks.l1 0.25 with stages prior, but only a codebook is trained for the eye" in line
    assert f"--tokenizer {folder}" in line
    assert "stages evaluate" in fails("--stage", "evaluate", "--run", folder, "--looks.r1", "0.5")
    new = [*words[: -len(TERMS + RIVAL)], "--stage", "prior", "--tokenizer", folder, "--run", tmp_path / "new"]
    assert "--looks.perceptual 1" in fails(*new, "--looks.perceptual", "1")
    assert not (tmp_path / "new").exists()
    assert sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file()) == before
    run(*words, "--stage", "prior", "--prior-fit.num-steps", "2")
    run("--resume", "--run", folder)
    run("--stage", "prior", "--resume", "--run", folder, "--prior-fit.num-steps", "3")
    run(*new)


def test_half_precision_throughout(run, looking, tmp_path):
    run(*without("--precision", looking), "--precision", "bf16-true")
    assert (8, "test", "perceptual_distance") in figures(tmp_path / "run")


def test_gaussian_latents_can_be_trained_for_the_eye(run, looking, tmp_path):
    run(*without("--model.quantizer.", looking), "--latents", "gaussian", "--model.dim", "3")
    assert (1, "train", "perceptual") in figures(tmp_path / "run")


@pytest.mark.parametrize("loss", ["hinge", "non-saturating"])
def test_losses_are_their_papers(loss):
    real, fake = torch.tensor([[[[2.0, 0.5]]]]), torch.tensor([[[[-3.0, 0.25]]]])
    got = discriminator.critic_loss(real, fake, loss), discriminator.generator_loss(fake, loss)
    if loss == "hinge":
        assert [each.item() for each in got] == pytest.approx([0.25 + 1.25 / 2, 2.75 / 2])
    else:
        one, zero = torch.ones_like(real), torch.zeros_like(real)
        bce = F.binary_cross_entropy_with_logits
        assert got[0].item() == pytest.approx((bce(real, one) + bce(fake, zero)).item())
        assert got[1].item() == pytest.approx(bce(fake, one).item())


def test_lecam_costs_logits_beyond_the_other_sides_average():
    anchors = torch.tensor([1.0, -1.0])
    near = discriminator.lecam(torch.tensor([[[[-2.0]]]]), torch.tensor([[[[2.0]]]]), anchors)
    far = discriminator.lecam(torch.tensor([[[[2.0]]]]), torch.tensor([[[[-2.0]]]]), anchors)
    assert (near.item(), far.item()) == (0, 18)


def test_augmentation_has_a_gradient_and_is_of_each_image():
    torch.manual_seed(0)
    images = torch.rand(1, 3, 16, 16).repeat(6, 1, 1, 1).requires_grad_()
    shown = discriminator.augmented(images)
    assert shown.shape == images.shape
    assert not torch.equal(shown[0], shown[1])
    (gradient,) = torch.autograd.grad(shown.square().sum(), images)
    assert gradient.isfinite().all()
    assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()
    # A quarter of each side is cut out at most, and an eighth moved in.
    assert (shown.abs().amax(1) == 0).float().mean() < 0.4


def test_one_image_and_many_give_the_same_logits():
    torch.manual_seed(0)
    rival = discriminator.PatchDiscriminator(num_channels=1, width=8, num_halvings=1)
    images = torch.rand(4, 1, 16, 16)
    torch.testing.assert_close(rival(images)[:1], rival(images[:1]))
    assert rival(torch.zeros(1, 1, rival.smallest(1), rival.smallest(1))).numel() > 0


@pytest.mark.parametrize(
    ("averages", "says"), [((5.0, -5.0), "wins"), ((0.0, 0.0), "no difference"), ((1.0, -1.0), "")]
)
def test_a_discriminator_that_wins_or_sees_nothing_is_told_of_once(averages, says, capsys):
    rival = Rival(LooksConfig(adversarial=0.1, width=8), 1)
    rival.averages.copy_(torch.tensor(averages))
    rival.tell()
    assert not capsys.readouterr().err
    rival.num_updates.fill_(1000)
    rival.tell()
    rival.tell()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(says)
    assert all(says in line for line in lines)
