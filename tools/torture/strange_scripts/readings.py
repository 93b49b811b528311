"""Ways to read what was recorded, each as the lines that a script has for it."""

from tools.torture.strange_scripts.entries import Entry

READINGS = (
    Entry("analyze", "recorder.close()\nfound = groktrace.analyze('run', **SETTINGS)"),
    Entry("while the recorder is open", "found = groktrace.analyze('run', **SETTINGS)", tags=("open",)),
    Entry(
        "the command",
        """
        recorder.close()
        options = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        command = [sys.executable, "-m", "groktrace", "analyze", "run", "--json", *options]
        printed = subprocess.run(command, capture_output=True, text=True)
        if printed.returncode not in (0, 3):
            kind = RuntimeError if "Traceback" in printed.stderr else groktrace.GroktraceError
            raise kind(printed.stderr.strip().splitlines()[-1])
        found = json.loads(printed.stdout)
        """,
    ),
    Entry(
        "of another process that never closed it",
        """
        recorder.close()
        shutil.rmtree("run")
        paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "training.py"], check=True, capture_output=True, env=paths)
        found = groktrace.analyze("run", **SETTINGS)
        """,
    ),
    Entry(
        "with a task",
        """
        recorder.close()
        task = groktrace.Task.from_model(model, train=train, val=val, **GIVEN)
        found = groktrace.analyze("run", task=task, **SETTINGS)
        """,
        avoid=("compiled",),
    ),
    Entry(
        "after a task of other data",
        """
        recorder.close()
        other = groktrace.Task.from_model(model, train=form(2 * x[:20], y[:20]), **GIVEN)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its data are others, as may be said
            groktrace.analyze("run", task=other, **SETTINGS)
        task = groktrace.Task.from_model(model, train=train, val=val, **GIVEN)
        found = groktrace.analyze("run", task=task, **SETTINGS)
        """,
        ("numbers", "classes", "images"),
        tags=("sized",),
        avoid=(
            "compiled",
            "parts of a random split, in loaders",
            "loader to train on, a pair to validate on",
            "one sample",
            "many",
        ),
    ),
    Entry(
        "by a worker that knew another run at the path",
        """
        recorder.close()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            os.rename("run", "aside")
            other = nn.Linear(3, 1)
            groktrace.watch(other, train=(torch.ones(8, 3), torch.ones(8, 1)), loss="mse", out="run").close()
            groktrace.analyze("run", executor=pool, **SETTINGS)
            shutil.rmtree("run")
            os.rename("aside", "run")
            found = groktrace.analyze("run", executor=pool, **SETTINGS)
        """,
    ),
    Entry(
        "the live model",
        """
        recorder.close()
        truth.finish()
        estimate = groktrace.estimate_llc(model, train=train, **{"loss": None, **GIVEN}, **SETTINGS)
        """,
        avoid=("left out", "averaged", "compiled"),
    ),
)
