"""`--device auto` and `--engine auto`: what is timed, what is taken, and what is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from serving.bundle import GOLDEN, ONNX, TORCHSCRIPT, Bundle, read_bundle, write_manifest
from serving.engines.choice import Candidate, Machine, choose, fastest
from serving.engines.graph import load_graph
from serving.errors import BundleError, ServingConfigError, VerificationError
from tests.bundles import discrete_policy
from tests.serving.torch_programs import write_torchscript
from tests.tiny_policies import memory_policy

ONNX_CPU, ONNX_CUDA = Candidate("onnx", "cpu"), Candidate("onnx", "cuda")
SCRIPT_CPU, SCRIPT_CUDA = Candidate("torchscript", "cpu"), Candidate("torchscript", "cuda")


@dataclass
class FakeMachine:
    """A machine whose clock moves only while a graph runs, by what that candidate takes a row.

    Attributes:
        call_s: Candidate to seconds for one call.
        row_s: Candidate to seconds for each row.
        wrong: Candidates that act otherwise than RLlib did.
    """

    call_s: Mapping[Candidate, float]
    row_s: Mapping[Candidate, float] = field(default_factory=dict)
    wrong: tuple[Candidate, ...] = ()
    now: float = 0.0
    loaded: list[Candidate] = field(default_factory=list)

    def machine(self) -> Machine:
        engines = {candidate.engine for candidate in self.call_s if candidate.device == "cuda"}
        failure = "it has none"
        return Machine(
            lambda engine: None if engine in engines else failure, self.load, lambda: self.now
        )

    def load(self, bundle: Bundle, engine: Any, device: Any) -> Any:
        candidate = Candidate(engine, device)
        self.loaded.append(candidate)
        return FakeGraph(load_graph(bundle), candidate, self)


class FakeGraph:
    """A real graph that claims to be another candidate."""

    def __init__(self, graph: Any, candidate: Candidate, machine: FakeMachine) -> None:
        self.name, self.device = candidate
        self._graph = graph
        self._candidate = candidate
        self._machine = machine

    def run(self, names: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        machine, n = self._machine, len(next(iter(inputs.values())))
        machine.now += machine.call_s[self._candidate]
        machine.now += n * machine.row_s.get(self._candidate, 0.0)
        found = dict(self._graph.run(names, inputs))
        if self._candidate in machine.wrong and "action" in found:
            found["action"] = 1 - found["action"]
        return found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return read_bundle(discrete_policy().save(tmp_path_factory.mktemp("choice") / "bundle"))


@pytest.fixture(scope="module")
def with_program(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that holds a TorchScript file too."""
    path = memory_policy().save(tmp_path_factory.mktemp("choice") / "bundle")
    write_torchscript(path / TORCHSCRIPT)
    write_manifest(path, memory_policy().facts(), [ONNX, GOLDEN, TORCHSCRIPT])
    return read_bundle(path)


def test_the_faster_device_is_taken_and_both_times_are_said(bundle: Bundle) -> None:
    fake = FakeMachine({ONNX_CPU: 2e-3, ONNX_CUDA: 5e-4})
    choice = choose([bundle], "onnx", "auto", max_batch_size=128, machine=fake.machine())
    assert (choice.engine, choice.device) == ("onnx", "cuda")
    assert {each: list(timing) for each, timing in choice.timings.items()} == {
        ONNX_CPU: [1, 64, 128],
        ONNX_CUDA: [1, 64, 128],
    }
    assert choice.timings[ONNX_CUDA][128] == pytest.approx(5e-4)
    assert choice.reason.startswith("onnx on cuda, the fastest at B=64: onnx on cpu 2,000 µs at")
    assert "onnx on cuda 500 µs at B=1, 500 µs at B=64" in choice.reason
    assert "\n" not in choice.reason


def test_a_small_network_stays_on_the_cpu(bundle: Bundle) -> None:
    # On the CPU each row costs, on the GPU each call: the GPU would win only beyond 64 rows.
    fake = FakeMachine({ONNX_CPU: 1e-5, ONNX_CUDA: 2e-4}, {ONNX_CPU: 2e-6})
    choice = choose([bundle], "onnx", "auto", max_batch_size=256, machine=fake.machine())
    assert choice.timings[ONNX_CUDA][256] < choice.timings[ONNX_CPU][256]
    assert choice.device == "cpu"


@pytest.mark.parametrize(("gpu_s", "device"), [(1.0e-3, "cpu"), (0.95e-3, "cpu"), (8e-4, "cuda")])
def test_a_tie_stays_on_the_cpu(bundle: Bundle, gpu_s: float, device: str) -> None:
    fake = FakeMachine({ONNX_CPU: 1e-3, ONNX_CUDA: gpu_s})
    assert choose([bundle], "onnx", "auto", machine=fake.machine()).device == device


def test_the_times_of_all_policies_count(bundle: Bundle, with_program: Bundle) -> None:
    fake = FakeMachine({ONNX_CPU: 1e-3, ONNX_CUDA: 2e-3})
    choice = choose([bundle, with_program], "onnx", "auto", machine=fake.machine())
    assert choice.timings[ONNX_CPU][64] == pytest.approx(2e-3)
    assert choice.timings[ONNX_CUDA][64] == pytest.approx(4e-3)


def test_batches_below_the_deciding_size_decide_at_the_largest(bundle: Bundle) -> None:
    fake = FakeMachine({ONNX_CPU: 1e-3, ONNX_CUDA: 5e-4})
    choice = choose([bundle], "onnx", "auto", max_batch_size=8, machine=fake.machine())
    assert list(choice.timings[ONNX_CPU]) == [1, 8]
    assert "the fastest at B=8" in choice.reason
    assert choice.device == "cuda"


@pytest.mark.parametrize(
    ("engine", "device", "chosen"),
    [("onnx", "cpu", ONNX_CPU), ("onnx", "cuda", ONNX_CUDA), ("auto", "cpu", ONNX_CPU)],
)
def test_nothing_is_timed_where_there_is_one_candidate(
    bundle: Bundle, engine: Any, device: Any, chosen: Candidate
) -> None:
    fake = FakeMachine({ONNX_CPU: 1e-3, ONNX_CUDA: 1e-3})
    choice = choose([bundle], engine, device, machine=fake.machine())
    assert (choice.engine, choice.device) == chosen
    assert not choice.timings
    assert not fake.loaded


def test_without_a_gpu_auto_is_the_cpu(bundle: Bundle) -> None:
    choice = choose([bundle], "onnx", "auto", machine=FakeMachine({ONNX_CPU: 1.0}).machine())
    assert choice.device == "cpu"
    assert choice.reason == "onnx on cpu: nothing else is here to choose"


def test_cuda_without_a_gpu_is_refused_and_says_what_to_do(bundle: Bundle) -> None:
    machine = FakeMachine({ONNX_CPU: 1.0}).machine()
    with pytest.raises(
        ServingConfigError, match=r"--device cuda: .*\(onnx: it has none\); use --device cpu"
    ):
        choose([bundle], "onnx", "cuda", machine=machine)


def test_a_device_that_acts_otherwise_than_rllib_is_never_taken(bundle: Bundle) -> None:
    fake = FakeMachine({ONNX_CPU: 1e-3, ONNX_CUDA: 1e-6}, wrong=(ONNX_CUDA,))
    choice = choose([bundle], "onnx", "auto", machine=fake.machine())
    assert choice.device == "cpu"
    assert list(choice.timings) == [ONNX_CPU]
    assert "onnx on cuda does not work: " in choice.reason
    assert "does not act as RLlib did" in choice.reason


def test_where_no_candidate_works_the_first_one_s_error_is_raised(bundle: Bundle) -> None:
    fake = FakeMachine({ONNX_CPU: 1e-3, ONNX_CUDA: 1e-3}, wrong=(ONNX_CPU, ONNX_CUDA))
    with pytest.raises(VerificationError, match=r"\(cpu\)"):
        choose([bundle], "onnx", "auto", machine=fake.machine())


def test_a_program_is_chosen_only_where_the_user_trusts_programs(with_program: Bundle) -> None:
    fake = FakeMachine({ONNX_CPU: 1e-3, SCRIPT_CPU: 1e-6})
    assert choose([with_program], "auto", "cpu", machine=fake.machine()).engine == "onnx"
    assert not fake.loaded
    choice = choose([with_program], "auto", "cpu", allow_programs=True, machine=fake.machine())
    assert choice.engine == "torchscript"
    assert fake.loaded == [ONNX_CPU, SCRIPT_CPU]


def test_an_engine_is_a_candidate_only_if_every_bundle_has_its_file(
    bundle: Bundle, with_program: Bundle
) -> None:
    fake = FakeMachine({ONNX_CPU: 1e-3, SCRIPT_CPU: 1e-6})
    choice = choose(
        [with_program, bundle], "auto", "cpu", allow_programs=True, machine=fake.machine()
    )
    assert choice.engine == "onnx"
    assert not fake.loaded


def test_engine_and_device_are_chosen_together(with_program: Bundle) -> None:
    times = {ONNX_CPU: 4e-3, SCRIPT_CPU: 3e-3, ONNX_CUDA: 2e-3, SCRIPT_CUDA: 1e-3}
    choice = choose(
        [with_program], "auto", "auto", allow_programs=True, machine=FakeMachine(times).machine()
    )
    assert (choice.engine, choice.device) == SCRIPT_CUDA
    assert list(choice.timings) == [ONNX_CPU, SCRIPT_CPU, ONNX_CUDA, SCRIPT_CUDA]


def test_an_engine_that_is_not_installed_is_no_candidate_for_auto(with_program: Bundle) -> None:
    def cuda_failure(engine: str) -> str:
        if engine == "torchscript":
            raise ServingConfigError("the engine 'torchscript' needs the package 'torch'")
        return "it has none"

    def load(bundle: Bundle, engine: Any, device: Any) -> Any:
        cuda_failure(engine)
        return load_graph(bundle, engine, device)

    machine = Machine(cuda_failure, load)
    choice = choose([with_program], "auto", "auto", allow_programs=True, machine=machine)
    assert choice.engine == "onnx"
    assert "torchscript on cpu does not work: the engine 'torchscript' needs" in choice.reason
    with pytest.raises(ServingConfigError, match="needs the package 'torch'"):
        choose([with_program], "torchscript", "auto", machine=machine)


def test_real_engines_are_timed_for_real(with_program: Bundle) -> None:
    machine = Machine(cuda_failure=lambda _: "it has none")
    choice = choose(
        [with_program], "auto", "auto", max_batch_size=64, allow_programs=True, machine=machine
    )
    assert list(choice.timings) == [ONNX_CPU, SCRIPT_CPU]
    for timing in choice.timings.values():
        assert list(timing) == [1, 64]
        assert all(0.0 < seconds < 10.0 for seconds in timing.values())
    assert choice.engine == fastest(choice.timings).engine


def test_a_missing_file_is_named_where_the_engine_is_told(bundle: Bundle) -> None:
    gpu = Machine(cuda_failure=lambda _: None)
    with pytest.raises(BundleError, match=r"has no policy\.torchscript\.pt"):
        choose([bundle], "torchscript", "auto", machine=gpu)
