"""What a run cannot do, said before it begins."""

from pathlib import Path

from training.options import Run
from training.prior_kinds import kind_of
from vqvae.model import CodesConfig
from vqvae.quantizers import QuantizerConfig

MAX_PRIOR_CODES = 2**20


def stages(run: Run) -> tuple[str, ...]:
    """What a run does. A codebook that it took from elsewhere stays as it is, also where it is resumed."""
    if run.stage != "all":
        return (run.stage,)
    return ("prior", "evaluate") if has_taken_codebook(run) else ("codebook", "prior", "evaluate")


def has_taken_codebook(run: Run) -> bool:
    """Whether the run's codebook is a copy of --tokenizer that it has not trained on."""
    folder = run.run
    return run.tokenizer is not None and (folder / "codebook").exists() and not _state(run, "codebook").exists()


def _state(run: Run, stage: str) -> Path:
    return run.run / "state" / f"{stage}.ckpt"


def check(run: Run, wanted: tuple[str, ...]) -> None:
    """ValueError for stages or options that do not go together."""
    config = run.model
    in_loop = isinstance(config, CodesConfig) and config.beta is not None
    if isinstance(config, CodesConfig) and ("prior" in wanted or in_loop):
        check_listable(config.quantizer)
    if "codebook" in wanted and has_taken_codebook(run):
        raise ValueError(
            f"{run.run} has the codebook of {run.tokenizer} as it is: train it on in another folder, with --run"
        )
    if wanted == ("prior",) and _state(run, "codebook").exists() and not (run.run / "codebook").exists():
        raise ValueError(f"the codebook of {run.run} is not finished: go on with --resume, then train its prior")
    if run.codes is not None and "codebook" in wanted:
        raise ValueError(
            f"--codes {run.codes} is for a prior, got stages {', '.join(wanted)}: add --stage prior, or leave it out"
        )
    if run.codes is not None and run.live:
        raise ValueError("--live encodes images while the prior trains, --codes are encoded already: leave one out")
    if run.schedule == "alternating" and not in_loop:
        raise ValueError(
            "--schedule alternating is for a prior in the loop of codes, and there is none; add --model.beta"
        )
    if in_loop:
        check_in_loop(run)
    if run.strategy.startswith("fsdp") and (run.strategy != "fsdp" or "codebook" in wanted):
        raise ValueError(
            f"--strategy fsdp shares out the weights of a prior, and is for --stage prior alone: got --strategy "
            f"{run.strategy} with stages {', '.join(wanted)}; train the codebook with --stage codebook --strategy auto"
        )
    assert run.prior_kind == kind_of(run.prior)
    if "codebook" in wanted and ("prior" in wanted or in_loop):  # before hours of training; others have a codebook
        run.prior.config(config.build(), None)
    for stage in wanted:
        if stage != "evaluate" and not run.resume and _state(run, stage).exists():
            raise ValueError(
                f"{run.run} already holds a {stage}; add --resume to go on with it, or name another folder with --run"
            )


def check_in_loop(run: Run) -> None:
    """ValueError for a prior that cannot be in the loop of codes."""
    if run.prior_kind != "Transformer":
        raise ValueError(
            f"a prior in the loop (--model.beta) is a transformer: got --prior-kind {run.prior_kind}, leave it out"
        )


def check_listable(config: QuantizerConfig) -> None:
    """A prior gives a probability to each code, so it must be able to list them."""
    num_codes = config.build().num_codes
    if num_codes > MAX_PRIOR_CODES:
        raise ValueError(
            f"a prior cannot list the {num_codes} codes of this quantizer, at most {MAX_PRIOR_CODES}: give each place "
            "several codes of fewer bits (--quantizer GroupedQuantizer/BSQ), or train the codebook alone with "
            "--stage codebook"
        )
