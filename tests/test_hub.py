"""Models to and from a hub, whose HTTP interface a server on this machine stands in for."""

import json
import shutil
import sys
import traceback

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, Hub
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from PIL import Image

import safefolder
from priors import TransformerPrior, UniformPrior
from priors.grid import GridModel
from vqvae import VQVAE, Autoencoder, cli
from vqvae.cli import pushing
from vqvae.codec.model_fingerprint import fingerprint
from vqvae.quantizers import EMAVectorQuantizer

CONFIG = {"class": "Thing", "size": 3}
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7)}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that this process takes for the real one, and an empty cache."""
    with Hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        disable_progress_bars()
        yield served
        enable_progress_bars()


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def saved(folder, size=3, **options):
    safefolder.save(folder, {**CONFIG, "size": size}, TENSORS, **options)
    return files(folder)


def size_of(name, **options):
    config, tensors = safefolder.load(name, **options)
    assert all(torch.equal(tensors[each], TENSORS[each]) for each in TENSORS)
    return config["size"]


def refused(message):
    """A ValueError of one line."""
    return pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$")


def test_a_hub_id_is_downloaded(hub, tmp_path):
    commit = hub.add("owner/name", {**saved(tmp_path / "a"), "huge.bin": b"x", "evil.py": b"raise SystemExit"})
    assert size_of("owner/name", cache_dir=tmp_path / "mine") == 3
    assert sorted(hub.fetched()) == ["config.json", "model.safetensors"]
    assert all(commit in path for _, path in hub.asked if "/resolve/" in path)
    assert not (tmp_path / "cache").exists()
    assert size_of("owner/name", cache_dir=tmp_path / "mine", local_files_only=True) == 3
    hub.asked.clear()
    hub.add("owner/shards", saved(tmp_path / "b", max_shard_size=10))
    assert size_of("owner/shards") == 3
    assert len(hub.fetched()) == 4


def test_a_revision_is_pinned(hub, tmp_path):
    old = hub.add("owner/name", saved(tmp_path / "a", size=1))
    repository = hub.repositories["owner/name"]
    repository.commit("main", saved(tmp_path / "b", size=2), "second")
    repository.commit("next", saved(tmp_path / "c", size=3), "third")
    assert size_of("owner/name") == 2
    assert size_of("owner/name", revision="next") == 3
    hub.asked.clear()
    assert size_of("owner/name", revision=old) == 1
    assert all(old in path for _, path in hub.asked)
    with refused("no revision 'abc123'"):
        safefolder.load("owner/name", revision="abc123")


@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE", "no server"])
def test_offline_from_the_cache(hub, tmp_path, monkeypatch, how):
    first = hub.add("owner/name", {f"codebook/{name}": data for name, data in saved(tmp_path / "a").items()})
    hub.add("owner/other", saved(tmp_path / "a"))
    safefolder.load("owner/name", subfolder="codebook")
    hub.asked.clear()
    options = {"local_files_only": True} if how == "local_files_only" else {}
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        huggingface_hub.close_session()  # sessions look at the switch when they are made
    if how == "no server":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{filename}")
    for revision in (None, "main", first):
        assert size_of("owner/name", subfolder="codebook", revision=revision, **options) == 3
    said = r"cannot be reached \(.*refused\)" if how == "no server" else rf"offline \({how}\)"
    for name, more in (("owner/other", {}), ("owner/name", {"revision": "next", "subfolder": "codebook"})):
        with refused(said + ", and the cache"):
            safefolder.load(name, **more, **options)
    assert not hub.asked
    if how == "HF_HUB_OFFLINE":
        monkeypatch.undo()
        huggingface_hub.close_session()


def test_what_the_hub_refuses_is_one_line(hub, tmp_path):
    hub.add("owner/private", saved(tmp_path / "a"), private=True)
    hub.add("owner/gated", saved(tmp_path / "a"), gated=True)
    hub.add("owner/foreign", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b""})
    hub.add("owner/empty", {"README.md": b""})
    for name, message in (
        ("owner/none", "there is none, or it is private and needs a token"),
        ("owner/private", "there is none, or it is private and needs a token"),
        ("owner/gated", "it is gated; accept its terms"),
        ("owner/foreign", "owner/foreign/config.json is not of this library"),
        ("owner/empty", "owner/empty has no config.json"),
        ("owner/na--me", "'owner/na--me' is neither a folder nor a model on the hub"),
    ):
        with refused(message):
            safefolder.load(name)
    assert size_of("owner/private", token=TOKEN) == 3
    with refused("owner/empty/codebook at 'main' has no config.json"):
        safefolder.load("owner/empty", subfolder="codebook", revision="main")


def test_a_push_takes_the_place_of_what_was_there_in_one_commit(hub, tmp_path, logged_in):
    folder = tmp_path / "a"
    saved(folder, max_shard_size=10)
    for name in ("README.md", "elbo.json", "samples.png", "notes.txt"):
        (folder / name).write_text("---\ntags: [a]\n---\nmine")
    url = safefolder.push(folder, "owner/name", message="first of all")
    repository = hub.repositories["owner/name"]
    first = url.rpartition("/")[2]
    assert url == f"{hub.url}/owner/name/tree/{repository.branches['main']}"
    assert not repository.private
    # One commit, after the one that every repository begins with.
    assert repository.messages == ["first", "first of all"]
    expected = {name: data for name, data in files(folder).items() if name != "notes.txt"}
    assert hub.at("owner/name") == {".gitattributes": b"", **expected}
    repository.commits[first]["LICENSE"] = b"theirs"
    again = saved(tmp_path / "b", size=4)
    safefolder.push(tmp_path / "b", "owner/name")
    readme = expected["README.md"]
    assert hub.at("owner/name") == {".gitattributes": b"", "LICENSE": b"theirs", "README.md": readme, **again}
    assert size_of("owner/name") == 4
    assert size_of("owner/name", revision=first) == 3


def test_push_to_a_branch_and_in_private(hub, tmp_path, logged_in):
    for size in (3, 4):
        saved(tmp_path / "a", size=size)
        safefolder.push(tmp_path / "a", "owner/name", private=True, revision="next")
        assert size_of("owner/name", revision="next", token=TOKEN) == size
    assert hub.repositories["owner/name"].private
    assert hub.at("owner/name").keys() == {".gitattributes"}


def test_a_push_that_fails_is_one_line(hub, tmp_path):
    folder = tmp_path / "thing"
    saved(folder, max_shard_size=10)
    with refused("could not push to 'owner/name'.*log in"):
        safefolder.push(folder, "owner/name")
    hub.add("owner/public", {})
    with refused("there already and is public"):
        safefolder.push(folder, "owner/public", private=True, token=TOKEN)
    assert hub.repositories["owner/public"].messages == ["first"]
    with refused("a commit; expected the name of a branch"):
        safefolder.push(folder, "owner/public", revision="0" * 40, token=TOKEN)
    with refused("could not push to 'no/such/name'"):
        safefolder.push(folder, "no/such/name", token=TOKEN)
    hub.full = True
    with refused("could not push to 'owner/public'.*402"):
        safefolder.push(folder, "owner/public", token=TOKEN)
    hub.asked.clear()
    (folder / "model-00002-of-00002.safetensors").unlink()
    with refused("names model-00002-of-00002.safetensors, which the folder does not have"):
        safefolder.push(folder, "owner/name", token=TOKEN)
    with refused("no model folder"):
        safefolder.push(tmp_path / "nowhere", "owner/public", token=TOKEN)
    assert not hub.asked


@pytest.mark.parametrize("token", ["hf_SECRET\n", " hf_SECRET"])
def test_a_token_is_never_shown(hub, tmp_path, token):
    saved(tmp_path / "a")
    for call in (
        lambda: safefolder.load("owner/name", token=token),
        lambda: safefolder.push(tmp_path / "a", "owner/name", token=token),
    ):
        with pytest.raises(ValueError, match="token") as caught:
            call()
        assert "SECRET" not in "".join(traceback.format_exception(caught.value))
    assert not hub.asked


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with untrained parts, and figures and pictures as a run leaves them."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    torch.manual_seed(0)
    quantizer = EMAVectorQuantizer.Config(num_codes=8, dim=4)
    model = VQVAE(image_size=16, width=8, num_blocks=1, quantizer=quantizer)
    model.save_pretrained(folder / "codebook")
    sizes = {"num_codes": 8, "grid": model.grid}
    prior = TransformerPrior(**sizes, num_classes=2, width=16, depth=1, num_heads=2)
    prior.save_pretrained(folder / "prior")
    UniformPrior(**sizes).save_pretrained(folder / "unigram")
    of = {"models": fingerprint(model, prior).hex(), "data": "/home/me/photos", "split": "test"}
    figures = {"bits_per_dim": 1.25, "rate": {"transformer": 30.5}, "images": 30, **of}
    (folder / "elbo.json").write_text(json.dumps(figures))
    for name in ("samples.png", "usage.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    (folder / "state").mkdir()
    (folder / "state" / "run.json").write_text(json.dumps({"data": {"source": "/home/me/photos", "root": None}}))
    return folder


def metrics(text):
    results = huggingface_hub.ModelCard(text).data.eval_results
    return {result.metric_type: result.metric_value for result in results}


def test_a_model_goes_there_and_back(hub, run, logged_in):
    model, prior = VQVAE.from_pretrained(run / "codebook"), TransformerPrior.from_pretrained(run, subfolder="prior")
    url = model.push_to_hub("owner/codes", figures={"psnr": 20.5})
    for kind, options in ((VQVAE, {}), (Autoencoder, {"revision": url.rpartition("/")[2]})):
        assert kind.from_pretrained("owner/codes", **options).fingerprint() == model.fingerprint()
    assert metrics(hub.at("owner/codes")["README.md"].decode()) == {"psnr": 20.5}
    prior.push_to_hub("owner/prior", private=True, revision="next")
    assert GridModel.from_pretrained("owner/prior", revision="next").fingerprint() == prior.fingerprint()
    with pytest.raises(ValueError, match="owner/codes"):
        GridModel.from_pretrained("owner/codes")
    with pytest.raises(TypeError, match="revison"):
        VQVAE.from_pretrained("owner/codes", revison="next")


def test_a_run_goes_there_and_is_used(hub, run, logged_in, tmp_path, monkeypatch, capsys):
    # What a model of its own left there goes.
    VQVAE.from_pretrained(run / "codebook").push_to_hub("owner/small")
    repository = hub.repositories["owner/small"]
    hub.at("owner/small")["ngram/x"] = b""
    pushing.push(run, "owner/small")
    assert capsys.readouterr().out.strip() == f"{hub.url}/owner/small/tree/{repository.branches['main']}"
    assert len(repository.messages) == 3
    sent = dict(hub.at("owner/small"))
    kept = {name: data for name, data in files(run).items() if not name.startswith("state/")}
    card = sent.pop("README.md").decode()
    # Where the images lie on this machine is nobody's business (case 17).
    figures = {**json.loads(kept.pop("elbo.json")), "data": "photos"}
    assert json.loads(sent.pop("elbo.json")) == figures
    assert sent == {".gitattributes": b"", **kept}
    assert "/home/me" not in card
    assert "test images of photos" in card

    hub.asked.clear()
    monkeypatch.chdir(tmp_path)
    for source, output in (("owner/small", "there.png"), (str(run), "here.png")):
        monkeypatch.setattr(sys, "argv", ["vqvae", "sample", source, "--num", "2", "--output", output])
        cli.main()
    # What is of no use here is not fetched.
    assert {name.partition("/")[0] for name in hub.fetched()} == {"codebook", "prior"}
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()

    code = card.partition("```python\n")[2].partition("```")[0]
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["images"].shape == (4, 1, 16, 16)
    assert scope["codes"].shape == (4, 4, 4)
    assert metrics(card) == {"bits_per_dim": 1.25, "rate_transformer": 30.5}
    assert "samples.png" in card
    assert "reconstructions.png" not in card


def test_models_of_a_run_are_pushed_by_the_command(hub, run, logged_in, tmp_path):
    for part in ("codebook", "prior", "unigram"):
        pushing.push(run / part, f"owner/{part}", private=True, revision="next")
        assert hub.repositories[f"owner/{part}"].private
        text = hub.at(f"owner/{part}", "next")["README.md"].decode()
        assert 'revision="next"' in text
        assert "No figures" in text
    shutil.copytree(run / "unigram", tmp_path / "own")
    (tmp_path / "own" / "README.md").write_text("mine")
    pushing.push(tmp_path / "own", "owner/own")
    assert hub.at("owner/own")["README.md"] == b"mine"


def test_figures_that_are_none_are_refused(hub, run, tmp_path):
    shutil.copytree(run / "codebook", tmp_path / "codebook")
    model = VQVAE.from_pretrained(run / "codebook")
    of = fingerprint(model, UniformPrior(num_codes=model.num_codes, grid=model.grid)).hex()
    wrong = json.dumps({"psnr": "20", "models": of})
    for text, message in (("[]", "holds a list"), ("{", "cannot be read"), (wrong, "figure 'psnr'")):
        (tmp_path / "elbo.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            pushing.push(tmp_path, "owner/broken")
    assert not hub.asked


def test_figures_of_other_weights_stay_at_home(hub, run, tmp_path, logged_in, capsys):
    """A run that trained on after its evaluation has figures and pictures, but they are not its own any more."""
    folder = tmp_path / "on"
    shutil.copytree(run, folder)
    prior = GridModel.from_pretrained(folder / "prior")
    with torch.no_grad():
        prior.logits.weight.add_(0.1)
    prior.save_pretrained(folder / "prior")
    pushing.push(folder, "owner/on")
    there = hub.at("owner/on")
    assert not {"elbo.json", "samples.png", "usage.png"} & there.keys()
    assert b"1.25" not in there["README.md"]
    assert "other weights" in capsys.readouterr().err
