import sys
import textwrap

import pytest
from torch import nn

import groktrace
from groktrace.errors import TaskError
from groktrace.run.factory import load_factory
from groktrace.run.task import Task


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """Importable modules with factories in them."""

    def module(name, text):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))

    module(
        "factories_of_a_user",
        """
        import torch
        import groktrace
        from groktrace.errors import TaskError

        number = 3

        def good():
            x = torch.ones(2, 1)
            return groktrace.Task.from_model(torch.nn.Linear(1, 1), train=(x, x), loss="mse")

        def bare():
            return torch.nn.Linear(1, 1)

        def failing():
            raise RuntimeError("no weights here")

        def needing(argument):
            return argument

        def misfit():
            return groktrace.Task.from_model(torch.nn.Linear(1, 1), train=torch.ones(2, 1))
        """,
    )
    module(
        "factories_in_a_script",
        """
        import pathlib
        import torch
        import groktrace

        model = torch.nn.Linear(1, 1)
        x = torch.ones(2, 1)

        def make():
            return groktrace.Task.from_model(model, loss="mse")

        with groktrace.watch(model, train=(x, x), loss="mse", out="recorded") as recorder:
            pathlib.Path("trained").touch()
        """,
    )
    module(
        "factories_that_train",
        """
        import torch
        import groktrace

        def make():
            model = torch.nn.Linear(1, 1)
            groktrace.watch(model, out="recorded").close()
            return groktrace.Task.from_model(model, loss="mse")
        """,
    )
    module("factories_that_end_the_process", "import sys; sys.exit('usage: script')\n")
    module("factories_that_cannot_be_parsed", "def broken(:\n")
    module("factories_that_fail_at_once", "raise ValueError('too early')\n")
    module("factories_that_lack_something", "import a_module_that_is_nowhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("factories_")]:
        del sys.modules[name]


def test_a_factory_makes_the_task(factories):
    task = load_factory("factories_of_a_user:good")
    assert isinstance(task, Task)
    assert task.n == 2


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("", "--task: expected package.module:factory, got ''"),
        ("module", "--task: expected package.module:factory, got 'module'"),
        ("module:", "--task: expected package.module:factory, got 'module:'"),
        (":factory", "--task: expected package.module:factory, got ':factory'"),
        ("factories_nowhere:good", r"--task .*: cannot be imported \(No module named .*run from the folder that holds"),
        ("factories_of_a_user:missing", r"--task .*: cannot be imported \(module .* has no attribute 'missing'"),
        ("factories_of_a_user:good:x", r"--task .*: cannot be imported \(module .* has no attribute 'good:x'"),
        (".relative:good", "--task .relative:good: cannot be imported"),
        ("factories_that_cannot_be_parsed:good", r"cannot be imported \(invalid syntax"),
        ("factories_that_fail_at_once:good", r"cannot be imported \(too early\)"),
        ("factories_that_lack_something:good", r"cannot be imported \(No module named 'a_module_that_is_nowhere'\)"),
        ("factories_that_end_the_process:good", r"cannot be imported \(usage: script\)"),
        ("factories_of_a_user:failing", r"failed \(RuntimeError: no weights here\)"),
        ("factories_of_a_user:needing", r"failed \(TypeError: needing\(\) missing 1 required positional argument"),
        ("factories_of_a_user:number", r"failed \(TypeError: 'int' object is not callable\)"),
        ("factories_of_a_user:bare", r"expected it to return groktrace.Task.from_model\(...\), got Linear"),
        ("factories_of_a_user:misfit", "loss: give exactly one of loss="),
    ],
)
def test_factories_that_cannot_be_used_are_named(factories, reference, message):
    with pytest.raises(TaskError, match=message):
        load_factory(reference)


@pytest.mark.parametrize("name", ["factories_in_a_script", "factories_that_train"])
def test_loading_a_factory_records_nothing(factories, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        TaskError, match=rf"--task {name}:make: loading it calls groktrace\.watch\(\).* under `if __name__ =="
    ):
        load_factory(f"{name}:make")
    assert not (tmp_path / "recorded").exists()
    assert not (tmp_path / "trained").exists()
    # Afterwards recordings are as ever.
    groktrace.watch(nn.Linear(1, 1), out=tmp_path / "later").close()
    assert (tmp_path / "later" / "run.json").exists()
