"""What the paper claims about distilled images with distilled representations, and what holds here.

Twenty handwritten digits of 8 x 8 pixels are distilled from 1,000 without labels. A fresh network
is trained on them, and its error is the squared distance from the self-supervised representation of
500 other digits, which has variance 1 in each dimension. The yardsticks are the same twenty images
before the distillation, distilled images with frozen targets, and all 1,000 images. That random
views inside the bilevel problem bias its gradient is exact, and a test of tests/methods/.

The paper measures accuracies after transfer. Here they would say nothing: a network with random
weights classifies these digits as well as all others do.
"""

from lab.claims import claim
from methods import krr_st

METRIC = "held-out MSE"


def tables(lab, seed):
    """{series: error} of one seed."""
    how = dict(world="pixels", seed=seed, steps=lab.few(1500), lr=3e-3, batch_size=256)
    table = krr_st.run(lab.at(**how), krr_st.Config(teacher_steps=lab.few(500)))
    found = {name: {METRIC: row[METRIC]} for name, row in table.items()}
    limit = found["random images"][METRIC] * 0.7
    return found | {"0.7 of random images": {METRIC: limit}}


def measure(lab):
    """{series: error of a student, one dict per seed}."""
    found = [lab.stage("tables", lambda seed=seed: tables(lab, seed)) for seed in lab.seeds]
    return {name: [each[name] for each in found] for name in found[0]}


CLAIMS = [
    claim(
        "On handwritten digits, a network trained on 20 distilled images has less than 0.7 of the "
        "error of one trained on 20 real images",
        METRIC,
        "KRR-ST",
        "<",
        "0.7 of random images",
        kind="primary",
        world="pixels",
        matched="images and steps of the student",
    ),
    claim(
        "On handwritten digits, learned targets lower the error below that of distilled images "
        "with frozen targets",
        METRIC,
        "KRR-ST",
        "<",
        "targets frozen",
        margin=0.01,
    ),
    claim(
        "On handwritten digits, distilled images with frozen targets have a lower error than real "
        "images",
        METRIC,
        "targets frozen",
        "<",
        "random images",
        margin=0.02,
    ),
    claim(
        "On handwritten digits, 20 distilled images do not reach the error of all 1,000 images",
        METRIC,
        "KRR-ST",
        ">",
        "all images",
        margin=0.02,
        kind="control",
        expect="supported",
    ),
]
