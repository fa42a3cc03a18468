"""The ready configuration files are read by accelerate's own launcher, and resolve to what they claim."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from distill.configuration import LAUNCHER_FLAGS, _flag_names, parse
from distill.files import RANKS
from pipelines.launch import warn_single_process
from pipelines.planning.launch_line import format_launch, read_launch_file

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"
SHARDED = ("gpu8_fsdp2", "nodes2_fsdp2")


@dataclass(frozen=True)
class Claim:
    """What a file says of itself."""

    kind: str
    processes: int
    machines: int = 1
    precision: str = "bf16"
    replicas: int = 1
    shards: int = 1


CLAIMS = {
    "gpu1": Claim("NO", 1),
    "gpu8_ddp": Claim("MULTI_GPU", 8),
    "gpu8_fsdp2": Claim("FSDP", 8),
    "nodes2_fsdp2": Claim("FSDP", 16, machines=2, replicas=2, shards=8),
    "cpu2": Claim("MULTI_GPU", 2, precision="no"),
}


def resolved(name):
    """The launcher's arguments and the file's contents, as `accelerate launch` makes them of the file alone."""
    flags = ["--config_file", f"{FOLDER / name}.yaml", "--main_process_ip", "host0", "recipes/dmd2_sdxl.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(flags))
    return args, defaults


def test_every_file_has_a_claim():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == CLAIMS.keys()


@pytest.mark.parametrize("name", CLAIMS)
def test_a_file_is_what_it_claims(name):
    args, defaults = resolved(name)
    claim = CLAIMS[name]
    assert defaults.distributed_type == DistributedType(claim.kind)
    assert (args.num_processes, args.num_machines, args.mixed_precision) == (
        claim.processes,
        claim.machines,
        claim.precision,
    )
    assert args.multi_gpu == (claim.kind == "MULTI_GPU") and args.use_fsdp == (claim.kind == "FSDP")
    assert not args.use_deepspeed and not args.use_megatron_lm and args.dynamo_backend == "no"
    assert args.use_parallelism_config == (claim.replicas > 1)
    assert args.use_cpu == (name == "cpu2")


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_files_reach_the_processes(name, monkeypatch):
    """What accelerate's plugins read from the environment that the launcher sets."""
    args, _ = resolved(name)
    args.machine_rank = 1  # no port of this machine is asked for
    environment = prepare_multi_gpu_env(args)
    assert args.nproc_per_node == "8" and environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    for key, value in environment.items():
        if key.startswith(("FSDP_", "ACCELERATE_", "PARALLELISM_CONFIG_")):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is None and not plugin.activation_checkpointing
    assert environment["FSDP_OFFLOAD_PARAMS"] == "false"
    assert not plugin.cpu_ram_efficient_loading and environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    sizes = ParallelismConfig()
    claim = CLAIMS[name]
    assert (sizes.dp_replicate_size, sizes.dp_shard_size) == (claim.replicas, claim.shards)
    assert sizes.total_size in (1, claim.processes)  # 1: none is given, all processes are one group


@pytest.mark.parametrize("name", CLAIMS)
def test_what_never_ran_says_so(name):
    """And its comment gives a command that names the file itself."""
    text = (FOLDER / f"{name}.yaml").read_text()
    assert ("Never run here." in text) == (name != "cpu2")
    assert f"accelerate launch --config_file recipes/accelerate/{name}.yaml" in text
    assert yaml.safe_load(text)["num_processes"] == CLAIMS[name].processes


@pytest.mark.parametrize(
    ("flags", "alone"),
    (
        ("--cpu --num_processes 2", True),
        ("--num_processes 2", True),
        ("--cpu --num_processes 1", False),
        ("--cpu", False),
    ),
)
def test_processes_that_were_not_started_are_missed(flags, alone, monkeypatch, capsys):
    """Where accelerate sees no two GPUs it starts one process; the environment is what it gives to that one."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", *RANKS):
        monkeypatch.delenv(name, raising=False)
    args, *_ = _validate_launch_command(launch_command_parser().parse_args([*flags.split(), "recipe.py"]))
    assert not args.multi_gpu
    for name, value in prepare_simple_launcher_cmd_env(args)[1].items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    warn_single_process()
    said = capsys.readouterr().err
    assert ("has started this one alone" in said and "recipes/accelerate/cpu2.yaml" in said) == alone
    monkeypatch.setenv("RANK", "0")
    warn_single_process()
    assert not capsys.readouterr().err


def test_slurm_starts_a_launcher_on_each_machine(tmp_path):
    """The script with stand-ins: scontrol names two machines, srun runs its command once for each of them."""
    bodies = {
        "scontrol": 'test "$*" = "show hostnames node[1-2]" && printf "node1\\nnode2\\n"',
        "srun": 'shift; for i in 0 1; do SLURM_NODEID=$i "$@"; done',
        "accelerate": f'printf "%s\\n" "$@" > "{tmp_path}/machine$SLURM_NODEID"',
        "python": f'exec "{sys.executable}" "$@"',
    }
    for name, body in bodies.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "SLURM_JOB_NODELIST": "node[1-2]", "PYTHONPATH": f"{FOLDER.parents[1]}"}
    words = ["run", "dmd2_sdxl", "--validation_images", "8"]
    subprocess.run(["bash", FOLDER / "nodes2.slurm", *words], env=env, cwd=tmp_path, check=True)
    for rank in (0, 1):
        argv = (tmp_path / f"machine{rank}").read_text().splitlines()
        assert argv.pop(0) == "launch"
        args = launch_command_parser().parse_args(argv)
        assert (args.machine_rank, args.main_process_ip) == (rank, "node1")
        assert args.config_file == f"{FOLDER / 'nodes2_fsdp2.yaml'}"
        assert args.module and [args.training_script, *args.training_script_args] == ["distill", *words]


def test_slurm_asks_for_the_machines_of_the_configuration():
    text = (FOLDER / "nodes2.slurm").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.M))
    claim = CLAIMS["nodes2_fsdp2"]
    assert int(asked["nodes"]) == claim.machines and asked["ntasks-per-node"] == "1"
    assert int(asked["nodes"]) * int(asked["gpus-per-node"]) == claim.processes
    assert "Written, not run" in text


@pytest.mark.parametrize(
    ("flag", "message"),
    (
        ("--num_machines", "--num_machines is one of `accelerate launch`, and stands before the recipe"),
        ("--num-procesess", "--num_processes is one of `accelerate launch`"),
    ),
)
def test_flags_of_the_launcher_are_named(flag, message, capsys):
    """Given to a recipe, also mistyped. All names are flags of the launcher, and none is one of a recipe."""
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    assert {f"--{name}" for name in LAUNCHER_FLAGS} <= known
    config = importlib.import_module("recipes.dmd2_sdxl").CONFIG
    assert not {*LAUNCHER_FLAGS} & {*_flag_names(config)}
    with pytest.raises(SystemExit) as end:
        parse(config, [flag, "2"])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_help_lists_flags_by_task(capsys):
    """Every flag of the list is one of the recipe, and has its own lines below."""
    config = importlib.import_module("recipes.dmd2_sdxl").CONFIG
    with pytest.raises(SystemExit):
        parse(config, ["--help"])
    text, _, panels = capsys.readouterr().out.partition("--config FILE.yaml sets")
    flags = re.findall(r"--[\w.]+", text.partition("Flags by task")[2])
    assert len(flags) > 25 and all(flag in panels for flag in flags if flag != "--config")
    assert "train options" in panels and "method options" in panels


@pytest.mark.parametrize("gpus, shards", ((1, 1), (4, 1), (8, 1), (8, 8), (4, 4), (64, 1), (64, 8)))
def test_launch_lines_of_a_plan_are_read_by_accelerate(gpus, shards):
    """They ask for the GPUs and shards of the plan; a configuration file is read back as the same."""
    run = SimpleNamespace(gpus=gpus, shards=shards, half=True)
    program = ["recipes/dmd2_sdxl.py", "--gradient-accumulation-steps", "1", "--data.cache", "my cache"]
    line = format_launch(run, program, ["--gradient_accumulation_steps 4"])
    words = shlex.split(line)
    assert words[:2] == ["accelerate", "launch"] and words[-4:-2] == ["--data.cache", "my cache"]
    words = [{"RANK": "0", "HOST0": "host0"}.get(word, word) for word in words[2:]]
    words[1] = f"{FOLDER.parents[1] / words[1]}"
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (args.num_processes, args.num_machines, args.mixed_precision) == (gpus, -(-gpus // 8), "bf16")
    assert args.use_fsdp == (shards > 1) and args.training_script == "recipes/dmd2_sdxl.py"
    if gpus > 8 and shards > 1:
        parallel = (args.parallelism_config_dp_replicate_size, args.parallelism_config_dp_shard_size)
        assert tuple(map(int, parallel)) == (gpus // shards, shards)
    if gpus in (1, 8):
        assert read_launch_file(Path(words[1])) == (gpus, shards, "bf16")
