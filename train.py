"""nanopref's command line: train with a method, sweep, test a paper's claims, prompt a model.

    python train.py --method dpo                                   a toy world, about a minute
    python train.py --method dpo,rdpo --flip 0,0.2,0.4 --seeds 3   all combinations: table and plot
    python train.py --method rdpo --claim                          the paper's claims; exit status 1
                                                                   if a verdict is not expected
    python train.py --judge results                                stored results, judged again
    python train.py --method dpo --init DIR --data FILE            your checkpoint and preferences
    python train.py --init OUT --prompt "..."                      ask a finished model
    python train.py --method dpo --beta 0.1,1 --jobs 2             a sweep in two processes
    python train.py --compare OUT OUT                              finished runs beside each other
    python train.py --method dpo --help                            one paper and its flags

Lists separated by commas run all combinations. --list names the methods and worlds.
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C while the libraries are imported; main() has its own way
    signal.signal(signal.SIGINT, lambda *about: (os.write(2, b"stopped\n"), os._exit(130)))

import contextlib
import dataclasses
import errno
import re
import shutil
import time
import traceback

import torch

from data import UserError, error_line, printable
from lab import (
    Lab,
    compare,
    contract,
    evaluate,
    flags,
    folder,
    manual,
    report,
    results,
    spread,
)
from lab.align import Stop
from lab.store import alone, open_cache, write_json, write_text

# errors that would end the other runs of a sweep, too: a full or broken disk, a closed pipe
BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EPIPE)

# ---------------------------------------------------------------- a run


def open_run(run, out, quiet=False, show=False):
    """Print the header of a run whose files go to `out` -> its Lab.

    quiet: print nothing. show: the Lab prints one row and its batch instead of training.
    """
    lab = Lab(run.settings, out, quiet, show)
    model = None if lab.world.kind == "vectors" else lab.base(run.paper.start)
    lab.say(report.header(lab, run.method, run.module, run.cfg, model))
    for reason, n in lab.world.counts.items():
        lab.say(f"{n} rows of {lab.world.name} are left out: {reason}")
    return lab


def report_run(run, lab, result):
    """Print what the method's `run` returned, and write the files -> the summary, a dict.

    UserError: it is something other than a model, a table or None.
    """
    out, say = lab.out, lab.say
    summary = dict(method=run.method, world=lab.world.name, seed=run.settings.seed)
    if lab.samples:  # in tokens, or in images; those of evaluations do not count
        summary["samples"] = lab.samples
    if not os.path.exists(os.path.join(out, folder.MARK)):  # one run of a sweep
        folder.write_run(out, run, {})
    folder.note_resolved(out, lab)
    if result is None:
        say(f"run of {run.method} returned None, so nothing is reported: is a `return` missing?")
        return summary
    if isinstance(result, dict) and any(isinstance(row, dict) for row in result.values()):
        summary |= {"table": result}
        say("\n" + report.rows_of(result))
    elif isinstance(result, dict):
        summary |= {"after": result}
        say("\n" + report.before_after({}, result))
    elif isinstance(result, torch.nn.Module):
        summary |= evaluate_run(run, lab, result)
    else:
        raise UserError(
            f"run of {run.method} returns a {type(result).__name__}: "
            "it must return the trained model, a table {name: number} or {row: {column: number}}, "
            "or None"
        )
    if lab.stopped:
        summary["stopped"] = lab.stopped
        print(f"{run.method}: {lab.stopped}", file=sys.stderr)
    names = ("base", "preferences", "align", "evaluate")
    summary["seconds"] = {name: round(lab.seconds.get(name, 0.0), 2) for name in names}
    write_json(os.path.join(out, "summary.json"), summary)
    about = f"{run.method} on {lab.world.name}, seed {run.settings.seed}"
    compare.picture(os.path.join(out, "curves.png"), {run.method: [compare.read(out)]}, about)
    shutil.rmtree(os.path.join(out, "stages"), ignore_errors=True)
    files = ", ".join(sorted(name for name in os.listdir(out) if name[0] != "."))
    took = report.clock(time.time() - lab.started)
    say(f"\n{took} in all; written to {printable(out, None)}/: {files}")
    return summary


def finished(out):
    """The summary of a run that an earlier call has finished, or None.

    A kill may have left its stages; they are removed.
    """
    if not os.path.exists(os.path.join(out, "summary.json")):
        return None
    shutil.rmtree(os.path.join(out, "stages"), ignore_errors=True)
    return folder.read_summary(out)


def evaluate_run(run, lab, model):
    """Evaluate the base model and the trained model; print the table and write the files -> dict.

    The files are samples, curves and the checkpoint.
    """
    out, say = lab.out, lab.say
    look = getattr(run.module, "evaluate", Lab.evaluate)
    before, after = (look(lab, m) for m in (lab.reference, model))
    found = {"before": before, "after": after}
    say("\n" + report.before_after(before, after))
    if lab.world.explain and (meaning := lab.world.explain(after)):
        say(meaning)
    if lab.world.reward is None:
        say("There is no true reward in this data, so none is reported.")
    elif lab.world.kind == "text":
        found["best_of"] = evaluate.best_of(lab)
        say("\n" + report.best_of(found["best_of"]))
    if lab.world.kind == "images":
        report.write_picture(out, lab.world.picture(*report.pictures(lab, model)))
        report.write_progress(out)
    elif lab.world.kind == "text":
        samples = report.side_by_side(lab, model)
        say("\n" + samples)
        write_text(os.path.join(out, "samples.txt"), samples + "\n")
    if callable(getattr(model, "save_pretrained", None)):
        model.save_pretrained(out)
    return {"steps": lab.steps, "params": report.count(model)} | found


# ---------------------------------------------------------------- a sweep


def sweep(runs, out, tasks, failed):
    """All combinations of settings, one folder per run; one table and one plot -> exit status.

    tasks: the indices of the runs that are done here; the others belong to other shards. failed:
    {index: reason} of runs that have failed already. A run that fails (a NaN, rows that its method
    cannot use, or an error in a method's code, with its traceback) is named, and the others go on.
    The exit status is then 2. UserError: every run fails.
    """
    varied = list(dict.fromkeys(name for run in runs for name in run.varied if name != "seed"))
    start, places = time.time(), []
    for i, run in enumerate(runs):
        changed = "-".join(f"{k}{v}" for k, v in run.varied.items()).replace(os.sep, "_")
        places.append(os.path.join(out, f"{i:03d}-{changed}"))
    for done, i in enumerate(tasks):
        left = (time.time() - start) / done * (len(tasks) - done) if done else None
        line = f"[{i + 1}/{len(runs)}] {runs[i].name()}"
        line += "" if left is None else f"; {report.clock(left)} left"
        print(line, file=sys.stderr, flush=True)
        lab = result = None  # the models of the run before take memory
        try:
            os.makedirs(places[i], exist_ok=True)
            with alone(places[i], wait=False):
                if not finished(places[i]):
                    lab = open_run(runs[i], places[i], quiet=True)
                    result = runs[i].module.run(lab, runs[i].cfg)
                    report_run(runs[i], lab, result)
        except Exception as error:
            if getattr(error, "errno", None) in BROKEN:
                raise
            failed[i] = str(error)
            if not isinstance(error, UserError):
                traceback.print_exc()
                failed[i] = f"{type(error).__name__}: {error_line(error)}"
            print(printable(f"{runs[i].name()}: {failed[i]}", None), file=sys.stderr)
            if not folder.trained(places[i]):
                shutil.rmtree(places[i], ignore_errors=True)
    lab = result = None
    rows, records, missing = [], [], []
    for i, (run, place) in enumerate(zip(runs, places)):
        summary = None if i in failed else finished(place)
        # a field that only some of the methods have
        about = dict.fromkeys(varied, "-") | dataclasses.asdict(run.settings) | vars(run.cfg)
        about["method"] = run.method
        if summary and "after" in summary:
            rows.append((about | {"row": "after"}, summary["after"]))
            records.append(compare.read(place))
        elif summary and "table" in summary:
            rows += [(about | {"row": row}, values) for row, values in summary["table"].items()]
        elif not summary and i not in failed:
            missing.append(run.name())
    if any(about["row"] != "after" for about, _ in rows):  # tables, one below the other
        varied.append("row")
    if rows:
        text = report.sweep_table(rows, varied or ["method"])
        print(text)
        write_text(os.path.join(out, "sweep.txt"), text + "\n")
        grouped = compare.groups(records)
        tables = dict(matched=compare.matched(grouped)) if len(grouped) > 1 else {}
        tables |= dict(samples=compare.at_samples(grouped))
        for name, table in tables.items():
            if table:
                print("\n" + printable(table, None, keep="\n"))
                write_text(os.path.join(out, f"{name}.txt"), table + "\n")
        plain = [{**{n: s[n] for n in [*varied, "seed"]}, **after} for s, after in rows]
        write_json(os.path.join(out, "sweep.json"), plain)
        path = os.path.join(out, "sweep.png")
        plot = ", sweep.png" if report.sweep_plot(path, rows, varied or ["method"]) else ""
        files = f"{compare.write(out, records, f'{len(records)} runs')}, " if records else ""
        place = printable(out, None)
        print(f"written to {place}/: sweep.txt, sweep.json{plot}, {files}one folder per run")
    if missing:
        print(printable(f"{len(missing)} of {len(runs)} runs are not done: {' | '.join(missing)}"))
    reasons = [f"{runs[i].name()}: {reason}" for i, reason in sorted(failed.items())]
    end = f"{len(failed)} of {len(runs)} runs failed: {' | '.join(reasons)}"
    if len(failed) == len(runs):
        raise UserError(end)
    if failed:
        say_error(end)
    return 2 if failed else 0


def compared(paths, out):
    """Finished runs and sweeps beside each other: a table at matched KL, a CSV and a picture."""
    records = compare.read_all(paths)
    grouped = compare.groups(records)
    for ranking in filter(None, (compare.matched(grouped), compare.at_samples(grouped))):
        print(printable(ranking, None, keep="\n") + "\n")
    files = compare.write(out, records, f"{len(records)} runs")
    print(f"written to {printable(out, None)}/: {files}")
    return 0


# ---------------------------------------------------------------- a question


def ask(settings, prompt):
    """Print the response of --init's model, or of the world's base model, to one prompt.

    A checkpoint's chat template is applied to the prompt. UserError: it is not a model of text.
    """
    lab = Lab(settings)
    if lab.world.kind != "text":
        raise UserError(
            f"--prompt needs a text model, but {lab.world.name} is a world of {lab.world.kind}"
        )
    model = lab.base()
    asked = prompt
    chat = model.tokenizer.chat
    if chat:
        prompt = chat([{"role": "user", "content": prompt}], True)
    lab.max_response = settings.max_response or 128
    row = lab.sample(model, [prompt], 1)[0]
    strange = unknown_words(lab, model, asked)
    if strange:
        print(
            printable(
                f"{lab.world.name} does not know: {', '.join(strange)} "
                "(they never occur in its texts, so the model was not trained on them)"
            ),
            file=sys.stderr,
        )
    answer = printable(lab.text(row["responses"][0]).strip(), None, keep="\n")
    print(answer or "(an empty response)")


def unknown_words(lab, model, prompt):
    """The words of a prompt that contain tokens which never occur in the toy world's own texts."""
    world, tokenizer = lab.world, model.tokenizer
    if lab.settings.data or type(world)().tokenizer.name != tokenizer.name:
        return []
    rows = world.demonstrations(512, lab.eval_rng("words"))
    texts = [text for row in rows for text in (row["prompt"], *row["responses"])]
    seen = {token for text in texts for token in lab.tokens(text)}
    words = dict.fromkeys(re.findall(r"\S+", prompt))
    forms = {word: (word, f" {word}", f"{word} ") for word in words}
    return [w for w in words if not any(seen.issuperset(tokenizer.encode(f)) for f in forms[w])]


# ---------------------------------------------------------------- several processes or machines


def several(runs, given, out):
    """Run a sweep or claims, or the part of a --shard, here or in --jobs processes -> exit status.

    given: the flags.
    """
    start = time.time()
    names = list(results.with_claims(runs)) if "claim" in given else runs
    tasks, failed = spread.share(len(names), given.get("shard")), {}
    if int(given.get("jobs", 1)) > 1:
        titles = [name if isinstance(name, str) else name.name() for name in names]
        failed = spread.in_processes(given, out, titles, int(given["jobs"]))
        tasks = []
    if "claim" in given:
        for i, reason in failed.items():
            say_error(f"{names[i]}: {reason}")
        seeds = sorted({run.settings.seed for run in runs})
        return results.claim(runs, seeds, out, tasks, start)
    return sweep(runs, out, tasks, failed)


def merged(given):
    """Join the folders of the shards of one command, and write its tables -> exit status."""
    folders, command = spread.parts_of(given["merge"])
    place = {name: given[name] for name in ("out", "overwrite") if name in given}
    known, chosen = flags.read_flags([f"--{name}={text}" for name, text in command.items()])
    runs = flags.combinations(known | place, chosen)
    into = None if "out" in given else folders[0]
    with folder.folder(runs[0], known, flags.label(runs, known), into) as out:
        if "claim" in known:
            results.gather(folders, out)
            return results.again(out, chosen)
        spread.gather(folders, out)
        return sweep(flags.fitting(runs, known), out, [], {})


# ---------------------------------------------------------------- the command line


def main(argv):
    """Carry out one command line -> exit status.

    0: done. 1: a claim has another verdict than its file expects, or --check found a broken
    contract. 2: a user's mistake, which is printed as one line on stderr, or runs of a sweep that
    failed. 3: the training of a single run ended early and its weights are saved; a line on stderr
    says why, such as that a policy unlearned the chosen responses of a file, or that no pairs were
    left. 130: interrupted. 141: stdout closed.
    """
    for stream in (sys.stdout, sys.stderr):  # characters that a terminal lacks must not stop a run
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")
    try:
        given, chosen, resumed = flags.read_command(argv)
        if "help" in given or not given:
            print(manual.page(__doc__, chosen))
            return 0
        if "list" in given:
            print(manual.listing())
            return 0
        runs = flags.combinations(given, chosen)
        flags.refuse_idle_actions(given, runs)
        open_cache()
        if "prompt" in given:
            ask(runs[0].settings, given["prompt"])
            return 0
        if "check" in given:
            return contract.check(runs[0])
        if "merge" in given:
            return merged(given)
        seeds = sorted({run.settings.seed for run in runs})
        if "judge" in given:
            return results.again(given["judge"], chosen or flags.catalogue())
        if "smoke" in given:
            return results.smoke(runs, seeds)
        free = resumed or "shard" in given or runs[0].settings.overwrite
        if "claim" in given and not free:
            results.refuse_measured(runs[0].settings.out, {run.method for run in runs}, seeds)
        if not {"claim", "compare"} & set(given):
            runs = flags.fitting(runs, given)
        run = runs[0]
        if "show" in given:
            with contextlib.suppress(Stop):
                run.module.run(open_run(run, None, quiet=True, show=True), run.cfg)
                raise UserError(f"{run.method} does not call lab.align, so there is no row to show")
            return 0
        if "shard" in given:
            return several(runs, given, spread.shared_folder(run, given))
        with folder.folder(run, given, flags.label(runs, given), resumed) as out:
            if "compare" in given:
                return compared(given["compare"].split("\n"), out)
            if "claim" in given or len(runs) > 1:
                return several(runs, given, out)
            summary = finished(out) if resumed else None
            if summary:
                print(f"{printable(out, None)} is finished already")
            else:
                lab = open_run(run, out)
                result = run.module.run(lab, run.cfg)
                summary = report_run(run, lab, result)
            return 3 if summary.get("stopped") else 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output, head for example, has seen enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        return 141
    except (UserError, OSError) as error:
        say_error(error)
        return 2


def say_error(error):
    """Print what is wrong as one line on stderr."""
    print("train.py: " + printable(" ".join(str(error).split()), None), file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
