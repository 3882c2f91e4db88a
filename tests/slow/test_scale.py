"""Features and statistics on Ray Data, against one machine; Ray is started once, on two CPUs."""

import copy
import json
import logging
import os
import signal
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import frostline as fl
from frostline import scale
from frostline.adapters import prefix as prefixes
from frostline.cache.shards import DIGEST_BYTES
from frostline.scale import cluster, features

pytestmark = [
    pytest.mark.slow,
    pytest.mark.once,
    # Ray warns of its own settings, and of sockets that it leaves to the end of the process.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

X = np.random.default_rng(0).normal(size=(300, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def ray():
    library = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    library.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 << 20,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    library.data.DataContext.get_current().enable_progress_bars = False
    yield library
    library.shutdown()


def rows_of(x, ids=None):
    """A data set with an image column, from rows that Arrow keeps flat, in four blocks."""
    import pyarrow
    import ray.data

    ids = np.arange(len(x)) if ids is None else np.asarray(ids)
    table = pyarrow.table({"id": ids, "flat": list(x.reshape(len(x), -1))})
    shape = x.shape[1:]

    def shaped(batch):
        return {"id": batch["id"], "image": np.stack(batch["flat"]).reshape(-1, *shape)}

    parts = [table.slice(start, 80) for start in range(0, len(x), 80)]
    return ray.data.from_arrow(parts).map_batches(shaped, batch_format="numpy")


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip
    model.eval()
    return model


def prefix_of(model):
    fl.freeze(model, "6")
    return fl.split(model).prefix


def computed(capsys):
    """How many samples the last line of progress says were computed."""
    return int(capsys.readouterr().err.split(" computed")[-2].split()[-1])


@pytest.fixture(scope="module")
def prefix():
    return prefix_of(network())


class TestCacheFeatures:
    def test_it_is_the_store_of_one_machine_and_goes_on_where_it_was(
        self, ray, prefix, tmp_path, capsys
    ):
        local = fl.cache_features(prefix, X, tmp_path / "local", engine="native", verbose=0)
        order = np.random.default_rng(1).permutation(200)
        part = rows_of(X[order], order)
        scale.cache_features(prefix, part, tmp_path / "ray", engine="native", verbose=2)
        assert computed(capsys) == 200

        # All samples, some of them twice under their id, and a shard that was changed meanwhile.
        victim = next((tmp_path / "ray").rglob("*.0.npy"))
        described = victim.with_name(victim.name.replace(".0.npy", ".json")).read_text()
        damaged = len(json.loads(described)["samples"]) // (2 * DIGEST_BYTES)
        victim.write_bytes(victim.read_bytes()[:-4] + b"1234")
        again = np.concatenate([np.arange(300), np.arange(40)])
        cache = scale.cache_features(
            prefix, rows_of(X[again], again), tmp_path / "ray", engine="native", verbose=2
        )
        assert computed(capsys) == 100 + damaged
        assert cache.keys == local.keys
        assert cache.fingerprint == local.fingerprint
        assert cache.ids.tolist() == list(range(300))
        np.testing.assert_array_equal(cache.rows(range(300))[0], local.rows(range(300))[0])

        found = fl.cache_features(prefix, X, tmp_path / "ray", engine="native", verbose=2)
        assert computed(capsys) == 0
        np.testing.assert_array_equal(found.rows(range(300))[0], local.rows(range(300))[0])

    def test_a_worker_that_is_killed_loses_nothing(self, ray, tmp_path, capsys, monkeypatch):
        flag = tmp_path / "killed"
        monkeypatch.setattr(features, "_INPUT_BYTES", 64 * X[0].nbytes)

        class Double:
            identity = "twice, and dies once"

            def __call__(self, x):
                if not flag.exists() and len(list(tmp_path.rglob("*.0.npy"))):
                    flag.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return [2 * x.reshape(len(x), -1)]

        cache = scale.cache_features(Double(), rows_of(X), tmp_path / "cache", verbose=2)
        assert flag.exists()
        assert cache.ids.tolist() == list(range(300))
        np.testing.assert_array_equal(cache.rows(range(300))[0], 2 * X.reshape(300, -1))
        assert computed(capsys) <= 300

    def test_a_kill_costs_the_batch_in_flight_and_not_its_block(self, ray, tmp_path, monkeypatch):
        flag, log = tmp_path / "killed", tmp_path / "computed"
        monkeypatch.setattr(features, "_INPUT_BYTES", 64 * X[0].nbytes)

        class Double:
            identity = "twice, and dies late in a block"

            def __call__(self, x):
                with log.open("ab") as file:
                    file.write(bytes(len(x)))
                if not flag.exists() and len(list(tmp_path.rglob("*.0.npy"))) > 2:
                    flag.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return [2 * x.reshape(len(x), -1)]

        data = rows_of(X).repartition(1).materialize()
        cache = scale.cache_features(
            Double(), data, tmp_path / "cache", actors=1, batch_size=64, verbose=0
        )
        assert flag.exists()
        np.testing.assert_array_equal(cache.rows(range(300))[0], 2 * X.reshape(300, -1))
        once = 64 * 5  # the last batch is filled up
        assert log.stat().st_size <= once + 2 * 64  # the driver's first look, and what was killed

    def test_ids_that_are_not_unique(self, ray, prefix, tmp_path):
        data = rows_of(X[:64], [*range(63), 7])
        with pytest.raises(fl.DataError, match="not unique: 7 stands for several"):
            scale.cache_features(prefix, data, tmp_path, engine="native", verbose=0)

    def test_what_workers_find_is_raised_as_what_it_is(self, ray, prefix, tmp_path):
        bad = X[:40].copy()
        bad[33] = np.nan
        with pytest.raises(fl.DataError, match=r"33"):
            scale.cache_features(prefix, rows_of(bad), tmp_path, engine="native", verbose=0)

    def test_bad_requests(self, ray, prefix, tmp_path):
        with pytest.raises(fl.DataError, match="no samples"):
            scale.cache_features(prefix, ray.data.from_items([]), tmp_path)
        with pytest.raises(fl.DataError, match=r"no column of ids.*columns data"):
            scale.cache_features(prefix, ray.data.from_numpy(X[:8]), tmp_path)
        with pytest.raises(fl.FrostlineError, match=r"room for 2 workers.*actors=99"):
            scale.cache_features(prefix, ray.data.from_numpy(X[:8]), tmp_path, actors=99)
        with pytest.raises(fl.DataError, match=r"does not take these inputs.*shape \(2, 8, 8\)"):
            scale.cache_features(prefix, rows_of(X[:64, :2]), tmp_path, engine="native")

    def test_what_the_users_own_function_raises_is_named(self, ray, prefix, tmp_path):
        def broken(row):
            raise KeyError("no such file") if row["id"] == 3 else AssertionError("not here")

        data = ray.data.from_items([{"id": 3}] * 8).map(broken)
        with pytest.raises(fl.FrostlineError, match=r"a worker of Ray failed: KeyError: .*no such"):
            scale.cache_features(prefix, data, tmp_path, engine="native")


class TestFeatures:
    """What ``map_batches`` calls with each batch."""

    def test_columns_are_kept_and_one_is_added(self, prefix, tmp_path):
        local = fl.cache_features(prefix, X, tmp_path, engine="native", verbose=0)
        function = scale.Features(prefix, batch_size=32)
        for rows in (slice(0, 50), slice(50, 51), slice(51, 300)):
            found = function({"id": np.arange(300)[rows], "image": X[rows], "label": X[rows, 0]})
            assert list(found) == ["id", "image", "label", "features"]
            np.testing.assert_array_equal(found["image"], X[rows])
            np.testing.assert_array_equal(found["features"], local.rows(np.arange(300)[rows])[0])

    def test_several_inputs_and_outputs_by_name(self):
        class Two:
            identity = "sum and difference"

            def __call__(self, x):
                return [x["a"] + x["b"], x["a"] - x["b"]]

        function = scale.Features(Two(), inputs={"a": "one", "b": "two"}, output="f")
        found = function({"one": X[:5], "two": X[5:10]})
        np.testing.assert_array_equal(found["f_0"], X[:5] + X[5:10])
        np.testing.assert_array_equal(found["f_1"], X[:5] - X[5:10])

    def test_columns_that_do_not_fit(self, prefix):
        with pytest.raises(fl.DataError, match=r"no column 'picture'.*columns id, image"):
            cluster.input_columns(["id", "image"], "picture")
        with pytest.raises(fl.DataError, match=r"which column.*inputs=None, columns a, b"):
            scale.Features(prefix)({"a": X, "b": X})
        ragged = np.empty(2, object)
        ragged[:] = [X[0], X[0, :, :4]]
        with pytest.raises(fl.DataError, match=r"several shapes.*size="):
            scale.Features(prefix)({"image": ragged})


class TestWorkers:
    """What a worker refuses; no cluster is needed to ask it."""

    def job(self, prefix, tmp_path, **other):
        whole = fl.cache_features(prefix, X[:32], tmp_path, engine="native", verbose=0)
        values = {
            "prefix": None, "known": None, "collection": whole.views[0].collection,
            "version": fl.__version__, "identity": prefixes.identity(prefix).text, "ids": "id",
            "inputs": "image", "dtype": "float32",
        }  # fmt: skip
        return features._Job(**{**values, **other})

    def test_another_version_other_weights_or_another_folder(self, prefix, tmp_path):
        features._require_same(self.job(prefix, tmp_path), prefix)
        with pytest.raises(fl.FrostlineError, match=r"the driver 0\.0\.1: install one version"):
            features._require_same(self.job(prefix, tmp_path, version="0.0.1"), prefix)
        other = network()
        with torch.no_grad():
            other[0].weight.add_(1e-3)
        with pytest.raises(fl.ModelError, match="the prefix is another one on a worker"):
            features._require_same(self.job(prefix, tmp_path), prefix_of(other))
        job = self.job(prefix, tmp_path)
        job.collection.folder.joinpath("collection.json").unlink()
        with pytest.raises(fl.FrostlineError, match="does not see the cache folder"):
            features._require_same(job, prefix)

    def test_a_prefix_is_itself_on_a_worker(self, prefix):
        pickling = pytest.importorskip("ray.cloudpickle")

        class Pickled:
            put = staticmethod(pickling.dumps)

        copied = pickling.loads(cluster.packed(Pickled, prefix))
        assert prefixes.identity(copied).text == prefixes.identity(prefix).text
        plain = pickling.loads(pickling.dumps(prefix))  # as before, for those without Frostline
        assert prefixes.identity(plain).text != prefixes.identity(prefix).text
        with pytest.raises(fl.ModelError, match="cannot be sent to workers"):
            cluster.packed(Pickled, sys._getframe())


class TestRecalibrate:
    @pytest.mark.parametrize("method", ["sequential", "batch"])
    def test_it_is_what_one_process_measures(self, ray, method):
        alone, together = network(), network()
        # The batches of method="batch" are what workers cut: 64 divides 64 + 64, and 32 too.
        fl.recalibrate(alone, X[:128], sites="all", method=method, batch_size=64)
        data = ray.data.from_numpy([X[:64], X[64:128]])
        change = scale.recalibrate(together, data, sites="all", method=method, batch_size=64)
        for one, other in zip(alone.buffers(), together.buffers(), strict=True):
            np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-6, atol=1e-7)
        assert "128 samples" in change.text
        change.undo()
        for one, other in zip(network().buffers(), together.buffers(), strict=True):
            np.testing.assert_array_equal(one.numpy(), other.numpy())

    def test_a_worker_that_is_killed_is_replaced_and_errors_are_plain(self, ray, tmp_path):
        flag = tmp_path / "killed"

        class Dies(nn.Module):
            def forward(self, x):
                if not flag.exists():
                    flag.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return x

        model = nn.Sequential(network(), Dies())
        alone = network()
        fl.recalibrate(alone, X[:128], sites="all")
        scale.recalibrate(model, ray.data.from_numpy([X[:64], X[64:128]]), sites="all")
        assert flag.exists()
        for one, other in zip(alone.buffers(), model.buffers(), strict=True):
            np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-6, atol=1e-7)

        before = copy.deepcopy(model.state_dict())
        with pytest.raises(fl.ModelError, match="nowhere"):
            scale.recalibrate(model, ray.data.from_numpy(X[:64]), sites="nowhere")
        assert all(torch.equal(before[name], model.state_dict()[name]) for name in before)


class TestWithoutACluster:
    def test_ray_that_is_not_installed_names_the_line(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(fl.BackendError, match=r'pip install "frostline\[ray\]"'):
            scale.connect()

    def test_an_address_where_nothing_answers(self, monkeypatch):
        library = pytest.importorskip("ray")
        monkeypatch.setattr(library, "is_initialized", lambda: False)
        with pytest.raises(fl.FrostlineError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 "):
            scale.connect("127.0.0.1:1")
        with pytest.raises(fl.FrostlineError, match="no HOST:PORT"):
            scale.connect("somewhere")
        with pytest.raises(fl.FrostlineError, match=r"is text, HOST:PORT.*Received: 5"):
            scale.connect(5)

    def test_another_address_than_that_of_this_process(self, monkeypatch):
        library = pytest.importorskip("ray")
        here = types.SimpleNamespace(gcs_address="127.0.0.1:6379")
        monkeypatch.setattr(library, "is_initialized", lambda: True)
        monkeypatch.setattr(library, "get_runtime_context", lambda: here)
        for address in (None, "auto", "127.0.0.1:6379", "localhost:6379", "ray://localhost:10001"):
            assert scale.connect(address) is library
        for address in ("localhost:1", "192.0.2.1:6379", "ray://192.0.2.1:10001", "somewhere"):
            with pytest.raises(fl.FrostlineError, match=r"127\.0\.0\.1:6379 already") as error:
                scale.connect(address)
            assert str(error.value).endswith(f"ray.shutdown() first. Received: {address!r}")

    def test_what_is_no_data_set_or_no_number(self):
        library = pytest.importorskip("ray")
        pytest.importorskip("ray.data")
        with pytest.raises(fl.DataError, match=r"are a ray\.data\.Dataset.*Received: ndarray"):
            scale.cache_features(nn.Linear(3, 3), X)
        with pytest.raises(fl.DataError, match=r"are a ray\.data\.Dataset.*Received: list"):
            scale.recalibrate(network(), [X])
        for name, value in (("samples", 0), ("actors", "two"), ("batch_size", True)):
            with pytest.raises(fl.DataError, match=f"{name} must be a whole number"):
                cluster.require_counts(**{name: value})
        with pytest.raises(fl.DataError, match="num_gpus must be a number"):
            cluster.workers(library, 1, -1)
        with pytest.raises(fl.DataError, match="inputs names the columns"):
            cluster.input_columns(["id", "image"], 3)

    def test_importing_the_room_loads_no_ray(self):
        import subprocess

        code = "import sys, frostline.scale; sys.exit('ray' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
