"""What SPINAL claims, and whether it holds here.

Deep: a GPT of six layers, aligned by DPO at beta = 0.1. alpha is the decay of a layer's spectrum,
and the path is the step of its next-token belief. Both are changes from the base model, averaged
over the last two layers or the four before. The primary claim compares the sizes of the two means,
so changes of opposite sign in the four early layers would cancel, in favor of the paper's claim.
The share is that of the last two layers in the gradient. That the instrument finds planted spectra,
and that frozen layers do not change, are tests (tests/methods/test_spinal.py).

Left out are the SPINALScore, a sum of the terms whose weights we do not know, a bootstrap over
prompts, a sweep of beta (dose response), and a base model at another temperature as a control. Fits
of a spectrum are kept whatever their R^2; the least R^2 is in the results (least_fit).

Tried on tuning seed 100: alpha rose in all layers and hardly more in the last two, the path there
was as before, and the last two layers had less than a third of the gradient. So the localized
signature is not expected on deep. It would have to appear in models of the paper's depth: the same
command measures any checkpoint with --init and --data.
"""

from lab.claims import claim
from methods.spinal import Config, loss
from methods.spinal import measure as measured


def end(lab, policy):
    """The measurements after an alignment."""
    return measured(lab, policy)


def measure(lab):
    """Curves on deep, whose last looks have the measurements of the layers."""
    arms = {"beta 0.1": (loss, Config(0.1))}
    curves = lab.race(arms, end=end, world="deep", eval_size=512, eval_every=150)
    out = dict(curves)
    for name, columns in dict(
        terminal=("alpha_terminal", "path_terminal"), early=("alpha_early", "path_early")
    ).items():
        out[name] = [
            dict(alpha=abs(c[-1][columns[0]]), path=c[-1][columns[1]]) for c in curves["beta 0.1"]
        ]
    return out


CLAIMS = [
    claim(
        "On deep, DPO changes the spectral exponent alpha more in the last third of the layers "
        "than in the others",
        "alpha",
        "terminal",
        ">",
        "early",
        margin=0.02,
        kind="primary",
        expect="inconclusive",
        world="deep",
        matched="model",
    ),
    claim(
        "On deep, DPO raises alpha in the last third of the layers",
        "alpha_terminal",
        "beta 0.1",
        ">",
        0.0,
        margin=0.02,
    ),
    claim(
        "On deep, DPO shortens the path of beliefs in the last third of the layers",
        "path_terminal",
        "beta 0.1",
        "<",
        0.0,
        margin=0.02,
        expect="inconclusive",
    ),
    claim(
        "On deep, after DPO the last third of the layers has more than its share of the gradient",
        "terminal_share",
        "beta 0.1",
        ">",
        1 / 3,
        margin=0.02,
        expect="inconclusive",
    ),
]
