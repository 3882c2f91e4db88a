"""The runner behind ``make test``: what it counts, and that nothing that went wrong is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import run_tests
from run_tests import Counts

pytestmark = pytest.mark.once


def write(folder: Path, name: str, source: str) -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return path


def pytest_results(folder: Path, source: str) -> tuple[Counts, int]:
    """Run real pytest on ``source`` and count the file that it wrote."""
    write(folder, "test_sample.py", source)
    junit = folder / "results.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={folder}"]
    process = subprocess.run(
        [*command, f"--junit-xml={junit}", str(folder)], capture_output=True, check=False
    )
    return run_tests.count_results(junit), process.returncode


class TestCountResults:
    def test_each_outcome_of_pytest_is_counted_once(self, tmp_path: Path) -> None:
        counts, code = pytest_results(
            tmp_path,
            """
            import pytest

            def test_passes(): pass
            @pytest.mark.parametrize("x", [1, 2])
            def test_passes_twice(x): pass
            def test_fails(): assert False
            def test_is_skipped(): pytest.skip("no data")
            @pytest.mark.xfail
            def test_fails_as_expected(): assert False
            @pytest.mark.xfail(strict=True)
            def test_passes_unexpectedly(): pass

            @pytest.fixture
            def broken_setup(): raise OSError
            def test_whose_setup_fails(broken_setup): pass

            @pytest.fixture
            def broken_teardown():
                yield
                raise OSError
            def test_whose_teardown_fails(broken_teardown): pass
            """,
        )
        assert counts == Counts(passed=3, failed=4, skipped=2)
        names = [line.split(":")[0].rpartition(".")[2] for line in counts.failures]
        assert names == [
            "test_fails",
            "test_passes_unexpectedly",
            "test_whose_setup_fails",
            "test_whose_teardown_fails",
        ]
        assert counts.failures[0].endswith("test_fails: assert False")
        assert run_tests.judge(counts, code) == counts

    def test_file_that_cannot_be_imported_is_a_failure(self, tmp_path: Path) -> None:
        counts, code = pytest_results(tmp_path, "import no_such_module_anywhere")
        assert run_tests.judge(counts, code).failed >= 1

    def test_no_test_at_all_is_a_failure(self, tmp_path: Path) -> None:
        counts, code = pytest_results(tmp_path, "x = 1")
        assert run_tests.judge(counts, code) == Counts(failed=1)

    @pytest.mark.parametrize("content", ["", "<testsuites><testsuite><testcase name='a'>"])
    def test_results_cut_off_count_as_nothing(self, tmp_path: Path, content: str) -> None:
        assert run_tests.count_results(write(tmp_path, "results.xml", content)) == Counts()

    def test_results_absent_count_as_nothing(self, tmp_path: Path) -> None:
        assert run_tests.count_results(tmp_path / "results.xml") == Counts()


class TestSlowestFiles:
    def test_seconds_of_a_file_are_those_of_its_tests_and_classes(self, tmp_path: Path) -> None:
        cases = [("tests.slow.test_a", 1.5), ("tests.test_b.TestMore", 2), ("tests.test_b", 0.25)]
        lines = [f'<testcase classname="{name}" name="x" time="{t}"/>' for name, t in cases]
        junit = write(tmp_path, "results.xml", f"<testsuite>{''.join(lines)}</testsuite>")
        assert run_tests.slowest_files(junit) == [
            (2.25, "tests.test_b"),
            (1.5, "tests.slow.test_a"),
        ]
        assert run_tests.slowest_files(junit, most=1) == [(2.25, "tests.test_b")]

    def test_nothing_where_the_results_are_cut_off(self, tmp_path: Path) -> None:
        assert run_tests.slowest_files(write(tmp_path, "results.xml", "<testsuite>")) == []


class TestJudge:
    @pytest.mark.parametrize("exit_code", [2, 3, 4, 5, 70, -9, -11, None])
    def test_process_that_did_not_end_by_itself_is_a_failure(self, exit_code: int | None) -> None:
        assert run_tests.judge(Counts(passed=8), exit_code) == Counts(passed=8, failed=1)

    def test_failure_that_the_results_do_not_show(self) -> None:
        assert run_tests.judge(Counts(passed=8), 1) == Counts(passed=8, failed=1)

    @pytest.mark.parametrize(("counts", "code"), [(Counts(8, 0, 1), 0), (Counts(8, 2, 0), 1)])
    def test_results_and_exit_code_that_agree_stand(self, counts: Counts, code: int) -> None:
        assert run_tests.judge(counts, code) == counts


class TestSummary:
    def test_line(self) -> None:
        assert str(Counts(5, 1, 2) + Counts(10, 0, 3)) == "15 passed, 1 failed, 5 skipped"

    @pytest.mark.parametrize(
        ("counts", "code"),
        [(Counts(3, 0, 2), 0), (Counts(3, 1, 0), 1), (Counts(), 1), (Counts(skipped=4), 1)],
    )
    def test_exit_code(self, counts: Counts, code: int) -> None:
        assert counts.exit_code == code


class TestSelectedBackends:
    def test_all_by_default(self) -> None:
        assert run_tests.selected_backends({}) == ("torch", "tensorflow", "jax")

    def test_named_ones_in_their_order_and_once(self) -> None:
        selected = run_tests.selected_backends({"FROSTLINE_TEST_BACKENDS": "torch, jax,torch"})
        assert selected == ("torch", "jax")

    def test_unknown_one_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"torch, tensorflow, jax.*Received: theano"):
            run_tests.selected_backends({"FROSTLINE_TEST_BACKENDS": "jax,theano"})


class TestRunBackend:
    """On a project of its own, so that it takes a second and not the whole suite."""

    @pytest.fixture
    def project(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(run_tests, "ROOT", tmp_path)
        marker = '[tool.pytest]\nmarkers = ["once: no backend"]\ntestpaths = ["."]\n'
        write(tmp_path, "pyproject.toml", marker)
        return tmp_path

    def test_backend_reaches_the_tests_and_the_home_of_the_user_does_not(
        self, project: Path
    ) -> None:
        write(
            project,
            "test_sample.py",
            """
            import os
            from pathlib import Path

            def test_backend():
                assert os.environ["KERAS_BACKEND"] == "torch"
                assert Path(os.environ["KERAS_HOME"]) != Path.home() / ".keras"
            """,
        )
        assert run_tests.run_backend("torch", [], first=True) == Counts(passed=1)

    def test_tests_marked_once_run_on_the_first_backend_only(self, project: Path) -> None:
        write(
            project,
            "test_sample.py",
            """
            import pytest

            @pytest.mark.once
            def test_once(): pass
            def test_always(): pass
            """,
        )
        assert run_tests.run_backend("jax", [], first=True) == Counts(passed=2)
        assert run_tests.run_backend("torch", [], first=False) == Counts(passed=1)

    def test_process_that_dies_is_a_failure(self, project: Path) -> None:
        write(
            project,
            "test_sample.py",
            """
            import os, signal

            def test_fine(): pass
            def test_dies(): os.kill(os.getpid(), signal.SIGKILL)
            """,
        )
        counts = run_tests.run_backend("jax", [], first=True)
        assert counts == Counts(passed=1, failed=1)  # what others finished is not lost

    def test_run_in_which_no_test_ends_is_stopped_and_what_it_finished_counts(
        self,
        project: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(run_tests, "GRACE_S", 20)
        self.watched(project)
        write(
            project,
            "test_sample.py",
            """
            import time

            def test_fine(): pass
            def test_hangs(): time.sleep(600)
            """,
        )
        start = time.monotonic()
        # Long enough for two processes to start where the machine is busy.
        counts = run_tests.run_backend("jax", [], first=True, stalled_s=45)
        assert counts == Counts(passed=1, failed=2)  # the test that hangs, and the run
        assert "test_sample.py::test_hangs" in capfd.readouterr().out
        assert time.monotonic() - start < 240

    def test_run_that_goes_on_is_never_stopped(self, project: Path) -> None:
        """Longer than the time without a test that ends: each test that ends counts anew."""
        self.watched(project)
        write(
            project,
            "test_sample.py",
            """
            import time
            import pytest

            @pytest.mark.parametrize("index", range(8))
            def test_takes_a_while(index): time.sleep(4)
            """,
        )
        counts = run_tests.run_backend("jax", ["-n0"], first=True, stalled_s=20)
        assert counts == Counts(passed=8)

    def watched(self, project: Path) -> None:
        """Give the project what tells the runner that a test has ended."""
        write(
            project,
            "conftest.py",
            """
            import os, pathlib

            def pytest_runtest_logreport(report):
                pathlib.Path(os.environ["FROSTLINE_TEST_PROGRESS"]).touch()
            """,
        )


def test_failed_static_check_is_counted_and_the_others_still_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    python = Path(sys.executable).name
    checks = {
        "breaks": [python, "-c", "raise SystemExit(3)"],
        "holds": [python, "-c", "print('second check ran')"],
    }
    monkeypatch.setattr(run_tests, "STATIC_CHECKS", checks)
    counts = run_tests.run_static_checks()
    assert counts == Counts(failed=1)
    assert counts.failures == ("static check: breaks",)
    assert "second check ran" in capfd.readouterr().out


def test_last_line_is_the_summary_and_the_exit_code_follows_it(tmp_path: Path) -> None:
    """The whole script, on a backend that is selected and a test that does not exist."""
    script = Path(run_tests.__file__)
    code = f"""
        import sys
        sys.path.insert(0, {str(script.parent)!r})
        import run_tests
        run_tests.STATIC_CHECKS = {{}}
        sys.exit(run_tests.main(["no_such_test.py"]))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "FROSTLINE_TEST_BACKENDS": "jax"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    *_, named, summary = result.stdout.splitlines()
    assert named.startswith("== FAILED jax: pytest ended with exit code")
    assert summary == "0 passed, 1 failed, 0 skipped"
    assert result.returncode == 1
