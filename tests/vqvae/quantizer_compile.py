"""Compiles and exports members; run by test_quantizer_use in a process of its own.

python quantizer_compile.py BACKEND NAME ...
"""

import sys
import warnings
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
# What torch itself says of its own internals while it compiles.
warnings.filterwarnings("ignore", category=DeprecationWarning)

from quantizer_worlds import KINDS, MEMBERS, features, objective, trained  # noqa: E402


def compare(name: str, training: bool, backend: str) -> None:
    member, plain, quantizer = MEMBERS[name], trained(name).train(training), trained(name).train(training)
    compiled = torch.compile(quantizer, fullgraph=True, backend=backend)
    z_e, same = (features(plain.dim, 3, *member.grid).requires_grad_() for _ in range(2))
    torch.manual_seed(0)
    want = plain(z_e)
    torch.manual_seed(0)
    got = compiled(same)
    assert got.codes.shape == want.codes.shape
    gradients = [torch.autograd.grad(objective(q), x)[0] for q, x in ((want, z_e), (got, same))]
    assert torch.isfinite(gradients[1]).all()
    if not (training and member.random):
        exact = {"rtol": 0, "atol": 0} if backend == "aot_eager" else {}
        torch.testing.assert_close(got.codes, want.codes)
        torch.testing.assert_close(got.z_q, want.z_q, **exact)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
        if training:
            plain.update()
            quantizer.update()
            torch.testing.assert_close(quantizer.state_dict(), plain.state_dict())


def export(name: str) -> None:
    member, quantizer = MEMBERS[name], trained(name).eval()
    z_e = features(quantizer.dim, 3, *member.grid)
    program = torch.export.export(quantizer, (z_e,))
    got, want = program.module()(z_e), quantizer(z_e)
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.z_q, want.z_q)


def main(backend: str, *names: str) -> None:
    for name in names:
        torch._dynamo.reset()
        try:
            # Of compositions evaluation is traced whole by the export below.
            for training in (True, False) if name in KINDS else (True,):
                compare(name, training, backend)
            export(name)
        except Exception as error:
            raise SystemExit(f"{name}: {type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main(*sys.argv[1:])
