"""Models to and from a hub, whose HTTP interface a server on this machine stands in for."""

import json
import os
import shutil
import subprocess
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
from priors import TransformerPrior, UniformPrior, UnigramPrior
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


def one_line(told):
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_hub_id_is_downloaded(hub, tmp_path):
    commit = hub.add("owner/name", {**saved(tmp_path / "a"), "huge.bin": b"x", "evil.py": b"raise SystemExit"})
    config, tensors = safefolder.load("owner/name")
    assert config["size"] == 3
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert sorted(hub.fetched()) == ["config.json", "model.safetensors"]
    assert all(commit in path for _, path in hub.asked if "/resolve/" in path)


def test_shards_are_downloaded(hub, tmp_path):
    hub.add("owner/name", saved(tmp_path / "a", max_shard_size=10))
    tensors = safefolder.load("owner/name")[1]
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert len(hub.fetched()) == 4


def test_a_revision_is_pinned(hub, tmp_path):
    old = hub.add("owner/name", saved(tmp_path / "a", size=1))
    repository = hub.repositories["owner/name"]
    repository.commit("main", saved(tmp_path / "b", size=2), "second")
    repository.commit("next", saved(tmp_path / "c", size=3), "third")
    assert safefolder.load("owner/name")[0]["size"] == 2
    assert safefolder.load("owner/name", revision="next")[0]["size"] == 3
    hub.asked.clear()
    assert safefolder.load("owner/name", revision=old)[0]["size"] == 1
    assert all(old in path for _, path in hub.asked)
    with pytest.raises(ValueError, match="it has no revision 'abc123'"):
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
        assert safefolder.load("owner/name", subfolder="codebook", revision=revision, **options)[0]["size"] == 3
    said = r"the hub cannot be reached \(.*refused\)" if how == "no server" else rf"offline \({how}\)"
    for name, more in (("owner/other", {}), ("owner/name", {"revision": "next", "subfolder": "codebook"})):
        with pytest.raises(ValueError, match=said + ", and the cache does not hold all of it") as told:
            safefolder.load(name, **more, **options)
        one_line(told)
    assert not hub.asked
    if how == "HF_HUB_OFFLINE":
        monkeypatch.undo()
        huggingface_hub.close_session()


READ = """
import sys, safefolder
try:
    print(safefolder.load("owner/name", subfolder=sys.argv[1])[0]["size"])
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_by_the_variables_that_users_set(hub, tmp_path):
    """In processes of their own, which know the hub by HF_ENDPOINT, its cache and HF_HUB_OFFLINE alone."""
    hub.add("owner/name", {f"codebook/{name}": data for name, data in saved(tmp_path / "a").items()})
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "kept"), "HF_HUB_DISABLE_XET": "1"}

    def read(part, **more):
        command = [sys.executable, "-c", READ, part]
        return subprocess.run(command, env={**env, **more}, capture_output=True, text=True, check=True).stdout.strip()

    assert read("codebook") == "3"
    hub.asked.clear()
    assert read("codebook", HF_HUB_OFFLINE="1") == "3"
    lacking = read("codebook", HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "empty"))
    assert "offline (HF_HUB_OFFLINE), and the cache does not hold all of it" in lacking
    assert len(lacking.splitlines()) == 1
    assert not hub.asked


def test_a_cache_of_ones_own(hub, tmp_path):
    hub.add("owner/name", saved(tmp_path / "a"))
    safefolder.load("owner/name", cache_dir=tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()
    assert not (tmp_path / "cache").exists()
    assert safefolder.load("owner/name", cache_dir=tmp_path / "mine", local_files_only=True)[0]["size"] == 3
    with pytest.raises(ValueError, match="offline"):
        safefolder.load("owner/name", local_files_only=True)


def test_what_the_hub_refuses_is_one_line(hub, tmp_path):
    hub.add("owner/private", saved(tmp_path / "a"), private=True)
    hub.add("owner/gated", saved(tmp_path / "a"), gated=True)
    hub.add("owner/foreign", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b""})
    hub.add("owner/newer", {"config.json": b'{"class": "Thing", "format": 2}', "model.safetensors": b""})
    hub.add("owner/empty", {"README.md": b""})
    for name, message in (
        ("owner/none", "there is none, or it is private and needs a token"),
        ("owner/private", "there is none, or it is private and needs a token"),
        ("owner/gated", "it is gated; accept its terms"),
        ("owner/foreign", "owner/foreign/config.json is not of this library"),
        ("owner/newer", "owner/newer is of format 2, this version reads format 1; upgrade"),
        ("owner/empty", "owner/empty has no config.json"),
        ("owner/na--me", "'owner/na--me' is neither a folder nor a model on the hub"),
    ):
        with pytest.raises(ValueError, match=message) as told:
            safefolder.load(name)
        one_line(told)
    assert safefolder.load("owner/private", token=TOKEN)[0]["size"] == 3
    with pytest.raises(ValueError, match=r"owner/empty/codebook at 'main' has no config.json"):
        safefolder.load("owner/empty", subfolder="codebook", revision="main")


def test_push_and_load_again(hub, tmp_path, logged_in):
    folder = tmp_path / "thing"
    saved(folder, max_shard_size=10)
    (folder / "README.md").write_text("---\ntags: [a]\n---\nmine")
    (folder / "samples.png").write_bytes(b"png")
    (folder / "notes.txt").write_text("private")
    url = safefolder.push(folder, "owner/name", message="first of all")
    repository = hub.repositories["owner/name"]
    assert url == f"{hub.url}/owner/name/tree/{repository.branches['main']}"
    assert not repository.private
    # One commit, after the one that every repository begins with.
    assert repository.messages == ["first", "first of all"]
    sent = repository.commits[repository.branches["main"]]
    assert sent == {
        ".gitattributes": b"",
        **{name: data for name, data in files(folder).items() if name != "notes.txt"},
    }
    tensors = safefolder.load("owner/name", revision=url.rpartition("/")[2])[1]
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_a_second_push_takes_the_place_of_the_first(hub, tmp_path, logged_in):
    saved(tmp_path / "a", max_shard_size=10)
    (tmp_path / "a" / "elbo.json").write_text("{}")
    first = safefolder.push(tmp_path / "a", "owner/name").rpartition("/")[2]
    repository = hub.repositories["owner/name"]
    repository.commits[first]["LICENSE"] = b"theirs"
    saved(tmp_path / "b", size=4)
    safefolder.push(tmp_path / "b", "owner/name")
    now = repository.commits[repository.branches["main"]]
    assert now == {".gitattributes": b"", "LICENSE": b"theirs", **files(tmp_path / "b")}
    assert safefolder.load("owner/name")[0]["size"] == 4
    assert safefolder.load("owner/name", revision=first)[0]["size"] == 3


def test_push_to_a_branch_and_in_private(hub, tmp_path, logged_in):
    saved(tmp_path / "a")
    safefolder.push(tmp_path / "a", "owner/name", private=True, revision="next")
    repository = hub.repositories["owner/name"]
    assert repository.private
    assert set(repository.commits[repository.branches["main"]]) == {".gitattributes"}
    assert safefolder.load("owner/name", revision="next", token=TOKEN)[0]["size"] == 3
    saved(tmp_path / "a", size=4)
    safefolder.push(tmp_path / "a", "owner/name", private=True, revision="next")
    assert safefolder.load("owner/name", revision="next", token=TOKEN)[0]["size"] == 4


def test_a_push_that_fails_is_one_line(hub, tmp_path, monkeypatch):
    folder = tmp_path / "thing"
    saved(folder)
    with pytest.raises(ValueError, match=r"could not push to 'owner/name'.*log in") as told:
        safefolder.push(folder, "owner/name")
    one_line(told)
    hub.add("owner/public", {})
    with pytest.raises(ValueError, match="is there already and is public"):
        safefolder.push(folder, "owner/public", private=True, token=TOKEN)
    assert hub.repositories["owner/public"].messages == ["first"]
    with pytest.raises(ValueError, match="which is a commit; expected the name of a branch"):
        safefolder.push(folder, "owner/public", revision="0" * 40, token=TOKEN)
    with pytest.raises(ValueError, match="could not push to 'no/such/name'"):
        safefolder.push(folder, "no/such/name", token=TOKEN)
    hub.full = True
    with pytest.raises(ValueError, match=r"could not push to 'owner/public'.*402") as told:
        safefolder.push(folder, "owner/public", token=TOKEN)
    one_line(told)
    hub.asked.clear()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="not of this library"):
        safefolder.push(folder, "owner/public", token=TOKEN)
    with pytest.raises(ValueError, match="no model folder"):
        safefolder.push(tmp_path / "nowhere", "owner/public", token=TOKEN)
    assert not hub.asked


def test_a_folder_that_lacks_a_shard_is_not_pushed(hub, tmp_path, logged_in):
    saved(tmp_path / "a", max_shard_size=10)
    (tmp_path / "a" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names model-00002-of-00002.safetensors, which the folder does not have"):
        safefolder.push(tmp_path / "a", "owner/name")
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
    config = TransformerPrior.Config(**sizes, num_classes=2, width=16, depth=1, num_heads=2)
    prior = config.build()
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


def same(model, other):
    own = model.state_dict()
    return own.keys() == other.state_dict().keys() and all(
        torch.equal(tensor, own[name]) for name, tensor in other.state_dict().items()
    )


def test_a_model_goes_there_and_back(hub, run, logged_in):
    model, prior = VQVAE.from_pretrained(run / "codebook"), TransformerPrior.from_pretrained(run, subfolder="prior")
    url = model.push_to_hub("owner/codes", figures={"psnr": 20.5})
    assert same(VQVAE.from_pretrained("owner/codes"), model)
    assert same(Autoencoder.from_pretrained("owner/codes", revision=url.rpartition("/")[2]), model)
    card = huggingface_hub.ModelCard(
        hub.repositories["owner/codes"].commits[url.rpartition("/")[2]]["README.md"].decode()
    )
    assert [result.metric_value for result in card.data.eval_results] == [20.5]
    prior.push_to_hub("owner/prior", private=True, revision="next")
    assert same(GridModel.from_pretrained("owner/prior", revision="next"), prior)
    with pytest.raises(ValueError, match="owner/codes"):
        GridModel.from_pretrained("owner/codes")
    with pytest.raises(TypeError, match="revison"):
        VQVAE.from_pretrained("owner/codes", revison="next")


def test_a_run_goes_there_and_is_used(hub, run, logged_in, tmp_path, monkeypatch, capsys):
    pushing.push(run, "owner/small")
    repository = hub.repositories["owner/small"]
    assert capsys.readouterr().out.strip() == f"{hub.url}/owner/small/tree/{repository.branches['main']}"
    sent = repository.commits[repository.branches["main"]]
    assert len(repository.messages) == 2
    kept = {name: data for name, data in files(run).items() if not name.startswith("state/")}
    card = sent.pop("README.md").decode()
    # Where the images lie on this machine is nobody's business (case 17).
    figures = {**json.loads(kept.pop("elbo.json")), "data": "photos"}
    assert json.loads(sent.pop("elbo.json")) == figures
    assert sent == {".gitattributes": b"", **kept}
    assert "/home/me" not in card
    assert "test images of photos" in card
    assert same(VQVAE.from_pretrained("owner/small", subfolder="codebook"), VQVAE.from_pretrained(run / "codebook"))

    hub.asked.clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vqvae", "sample", "owner/small", "--num", "2", "--output", "there.png"])
    cli.main()
    # What was fetched before is not fetched again, and what is of no use here not at all.
    assert sorted(hub.fetched()) == ["prior/config.json", "prior/model.safetensors"]
    monkeypatch.setattr(sys, "argv", ["vqvae", "sample", str(run), "--num", "2", "--output", "here.png"])
    cli.main()
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()


def test_the_lines_of_the_card_of_a_run_work(hub, run, logged_in):
    pushing.push_run(run, "owner/small")
    repository = hub.repositories["owner/small"]
    text = repository.commits[repository.branches["main"]]["README.md"].decode()
    code = text.partition("```python\n")[2].partition("```")[0]
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["images"].shape == (4, 1, 16, 16)
    assert scope["codes"].shape == (4, 4, 4)
    card = huggingface_hub.ModelCard(text)
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "bits_per_dim": 1.25,
        "rate_transformer": 30.5,
    }
    assert "samples.png" in text
    assert "reconstructions.png" not in text


def test_a_run_takes_the_place_of_what_was_there(hub, run, logged_in, tmp_path):
    VQVAE.from_pretrained(run / "codebook").push_to_hub("owner/small")
    hub.repositories["owner/small"].commits[hub.repositories["owner/small"].branches["main"]]["ngram/x"] = b""
    pushing.push_run(run, "owner/small")
    repository = hub.repositories["owner/small"]
    now = repository.commits[repository.branches["main"]]
    assert "config.json" not in now
    assert "ngram/x" not in now
    assert "codebook/config.json" in now


def test_models_of_a_run_are_pushed_by_the_command(hub, run, logged_in, tmp_path):
    for part in ("codebook", "prior", "unigram"):
        pushing.push(run / part, f"owner/{part}", private=True, revision="next")
        repository = hub.repositories[f"owner/{part}"]
        assert repository.private
        text = repository.commits[repository.branches["next"]]["README.md"].decode()
        assert 'revision="next"' in text
        assert "No figures were measured" in text
    UnigramPrior(num_codes=8, grid=(4, 4)).save_pretrained(run.parent / "own")
    safefolder.files.write_text(run.parent / "own" / "README.md", "mine")
    pushing.push(run.parent / "own", "owner/own")
    repository = hub.repositories["owner/own"]
    assert repository.commits[repository.branches["main"]]["README.md"] == b"mine"


def test_what_a_command_cannot_find_on_the_hub_is_one_line(hub, run, monkeypatch, capsys, tmp_path):
    hub.add("owner/codes", files(run / "codebook"))
    for command, message in (
        (["sample", "owner/none"], "there is none, or it is private"),
        (["sample", "owner/codes"], "owner/codes has no prior"),
        (["reconstruct", "owner/codes"], "name some with --data"),
    ):
        monkeypatch.setattr(sys, "argv", ["vqvae", *command])
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        told = capsys.readouterr().err
        assert message in told
        assert len(told.strip().splitlines()) == 1


def test_figures_that_are_none_are_refused(hub, run, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(run / "codebook", folder / "codebook")
    model = VQVAE.from_pretrained(folder / "codebook")
    of = fingerprint(model, UniformPrior(num_codes=model.num_codes, grid=model.grid)).hex()
    wrong = json.dumps({"psnr": "20", "models": of})
    for text, message in (("[]", "holds a list"), ("{", "cannot be read"), (wrong, "figure 'psnr'")):
        (folder / "elbo.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            pushing.push(folder, "owner/broken")
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
    repository = hub.repositories["owner/on"]
    there = repository.commits[repository.branches["main"]]
    assert not {"elbo.json", "samples.png", "usage.png"} & there.keys()
    assert b"1.25" not in there["README.md"]
    assert "are of other weights and stay here" in capsys.readouterr().err


@pytest.mark.parametrize("token", ["hf_SECRET\n", "hf_SECRET\r", " hf_SECRET", "hf SECRET"])
def test_a_token_is_never_shown(hub, tmp_path, token):
    saved(tmp_path / "a")
    for call in (
        lambda: safefolder.load("owner/name", token=token),
        lambda: safefolder.push(tmp_path / "a", "owner/name", token=token),
    ):
        with pytest.raises(ValueError, match="no token has") as caught:
            call()
        assert "SECRET" not in "".join(traceback.format_exception(caught.value))
    assert not hub.asked
