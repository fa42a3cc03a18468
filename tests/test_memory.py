"""What saves memory or time must change nothing else: half precision."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from replay import pushed
from test_trainer import METHODS, config, nets_of, vectors
from tiny import tiny

from distill.lora import LoRA, twin
from distill.methods import LCD, SiD
from distill.roles import FakeConfig, StudentConfig, build
from distill.schedule import Flow
from distill.trainer import train

ADAPTERS = LoRA(rank=4, alpha=8.0, targets=("mid", "last"))


@pytest.fixture
def engine():
    """engine(mixed_precision) -> Accelerator; accelerate holds one precision a process."""

    def make(precision="no"):
        AcceleratorState._reset_state(True)
        return Accelerator(cpu=True, mixed_precision=precision)

    yield make
    AcceleratorState._reset_state(True)


def tensors(net):
    return {p.data_ptr() for p in net.parameters()}


# ---- half precision ----


@pytest.mark.parametrize("name", METHODS)
def test_gradients_in_bf16(name, engine):
    """Of every parameter of every player, close to those in float32; the students take two steps."""
    found, said = {}, []
    for precision in ("no", "bf16"):
        nets = nets_of(METHODS[name])
        nets.student.denoiser.net.mid.register_forward_hook(lambda m, args, out: said.append(out.dtype))
        with pushed(nets) as found[precision]:
            *_, state = train(METHODS[name], nets, vectors, config(max_train_steps=1), engine(precision))
        assert (torch.bfloat16 in said) == (precision == "bf16")
        for average in (state.ema.net, *nets.modules().values()):
            assert {p.dtype for p in average.parameters()} == {torch.float32}
    for role, exact in found["no"].items():
        assert exact.keys() == found["bf16"][role].keys()
        for parameter, g in exact.items():
            error = (found["bf16"][role][parameter] - g).norm()
            assert error <= 0.1 * g.norm(), (role, parameter, error / g.norm())  # at most 0.034 were seen


def test_no_cast_outlives_a_call(engine):
    """A cast made by a call without gradient has no graph: the student's last call must make its own."""
    cached = []
    nets = nets_of(SiD())
    nets.student.denoiser.net.mid.register_forward_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
    next(train(SiD(), nets, vectors, config(), engine("bf16")))
    assert cached and not any(cached)


@pytest.mark.parametrize("lora", (LoRA(), ADAPTERS), ids=("full", "lora"))
def test_what_trains_from_a_half_precision_teacher_is_float32(lora, engine):
    """Weights and average in float32, so that small steps are not rounded away; the one backbone stays bfloat16."""
    teacher = tiny(Flow(), "flow", dtype=torch.bfloat16)
    nets = build(SiD(), teacher, (2,), None, StudentConfig(steps=2, lora=lora), FakeConfig(lora=lora))
    before = {role: [p.detach().clone() for p in net.parameters()] for role, net in nets.modules().items()}
    *_, state = train(SiD(), nets, vectors_alone, config(learning_rate=1e-6, max_train_steps=2), engine("bf16"))
    assert {p.dtype for p in teacher.net.parameters()} == {torch.bfloat16}
    for role, net in {**nets.modules(), "average": state.ema.net}.items():
        adapted = lora.rank is not None
        assert (tensors(teacher.net) <= tensors(net)) if adapted else not tensors(teacher.net) & tensors(net), role
        own = [p for p in net.parameters() if p.data_ptr() not in tensors(teacher.net)]
        assert own and {p.dtype for p in own} == {torch.float32}, role
    for role, net in nets.modules().items():  # steps of 1e-6 are below bfloat16's grain
        moved = [not torch.equal(a, b) for a, b in zip(before[role], net.parameters()) if b.requires_grad]
        assert sum(moved) >= len(moved) // 2 > 0, role


def vectors_alone(draw):
    return {}


def test_a_target_shares_the_backbone():
    """The target of consistency distillation is a copy of the adapters alone."""
    nets = build(LCD(), tiny(Flow(), "flow"), (2,), student=StudentConfig(lora=ADAPTERS))
    assert tensors(nets.teacher.net) <= tensors(nets.target.net)
    assert tensors(nets.target.net) & tensors(nets.student.denoiser.net) == tensors(nets.teacher.net)
    assert not any(p.requires_grad for p in nets.target.net.parameters())
    assert tensors(twin(nets.student.denoiser.net)) & tensors(nets.student.denoiser.net) == tensors(nets.teacher.net)
