"""Preference losses, their gradients and metrics equal TRL's; see `golden/make_trl_golden.py`."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from egjax import losses

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.append(str(GOLDEN))
from make_trl_golden import BETA, FILE, GAMMA, NLL_WEIGHT, NOISE, PAIRS, record  # noqa: E402

RECORDED = json.loads(FILE.read_text())
OURS = {
    "dpo": lambda c, r, rc, rr, n, m: losses.dpo(c, r, rc, rr, beta=BETA),
    "cdpo": lambda c, r, rc, rr, n, m: losses.cdpo(c, r, rc, rr, beta=BETA, noise=NOISE),
    "robust": lambda c, r, rc, rr, n, m: losses.robust_dpo(c, r, rc, rr, beta=BETA, noise=NOISE),
    "ipo_averaged": lambda c, r, rc, rr, n, m: losses.ipo(c, r, rc, rr, tau=BETA, lengths=(n, m)),
    "hinge": lambda c, r, rc, rr, n, m: losses.hinge(c, r, rc, rr, beta=BETA),
    "length_normalised": lambda c, r, rc, rr, n, m: losses.length_normalised_dpo(
        c, r, rc, rr, n, m, beta=BETA
    ),
    "rpo": lambda c, r, rc, rr, n, m: losses.rpo(c, r, rc, rr, n, beta=BETA, nll_weight=NLL_WEIGHT),
    "simpo": lambda c, r, rc, rr, n, m: losses.simpo(c, r, n, m, beta=BETA, gamma=GAMMA),
}


@pytest.mark.parametrize("name", RECORDED["numbers"])
def test_loss_and_gradient(name):
    for pair, want in zip(PAIRS, RECORDED["numbers"][name], strict=True):
        loss, grads = jax.value_and_grad(lambda *a: OURS[name](*a)[0], argnums=(0, 1))(*pair)
        np.testing.assert_allclose(loss, want["loss"], rtol=1e-5, err_msg=str(pair))
        np.testing.assert_allclose(grads, want["grads"], rtol=1e-5, atol=1e-7, err_msg=str(pair))


@pytest.mark.parametrize("name", ["dpo", "cdpo", "robust", "hinge", "rpo"])
def test_margin_and_accuracy(name):
    for pair, want in zip(PAIRS, RECORDED["numbers"][name], strict=True):
        metrics = OURS[name](*pair)[1]
        np.testing.assert_allclose(metrics.margin, want["margin"], rtol=1e-5)
        assert metrics.accuracy == want["accuracy"]


def test_the_installed_trl_gives_the_recorded_numbers():
    trl = pytest.importorskip("trl")
    if trl.__version__ != RECORDED["versions"]["trl"]:
        pytest.skip(f"recorded with trl {RECORDED['versions']['trl']}, found {trl.__version__}")
    for name, rows in record().items():
        for got, want in zip(rows, RECORDED["numbers"][name], strict=True):
            for key in want:
                np.testing.assert_allclose(got[key], want[key], rtol=1e-6, err_msg=name)
