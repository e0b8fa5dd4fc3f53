"""How a run works: the Lab, the training loop, settings and reports.

Nobody has to read this folder to change a paper. From Python:

    from lab import Lab, Settings
    from methods import dpo

    lab = Lab(Settings(world="bandit"))
    policy = dpo.run(lab, dpo.Config())
    print(policy.curve)

One run, in the order in which it passes the files:

    flags, settings     the command line: which methods, worlds, settings and runs it asks for
    rehearsal           mistakes of the user are found before anything is trained
    folder, store       the folder of a run, and values on disk: cache, stages, checkpoints
    lab                 the Lab: base model, samples, labels, random numbers, races
    align, batches      preferences become batches, with the reference's log-probs
    loop, check, graph  the training loop; the contract of a loss; steps as CUDA graphs
    evaluate, report    metrics and evaluations; tables, samples and pictures

Beside it: compare (runs beside each other), claims and results (verdicts on papers), contract
(--check), manual (--help and --list), spread (--jobs and --shard), hub and render (checkpoints,
tokenizers and chat templates of others).
"""

from lab.lab import Lab
from lab.settings import Settings

__all__ = ["Lab", "Settings"]
