"""Break the code on purpose, one mistake at a time, and show the test that notices. `make mutate`; exit 1 if none does.

python tests/mutate.py [WORD ...]     only the mutations whose group or name holds one of the words

Works on a copy of the tree. Each mistake is made in a child process, forked after everything slow is imported.
"""

import importlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("distill", "pipelines", "eval", "recipes", "tests")
SLOW = (  # imported once, before the first fork; nothing of this project
    "torch accelerate.utils diffusers.pipelines.consistency_models diffusers.models.unets.unet_2d hypothesis "
    "diffusers.models.unets.unet_2d_condition numpy peft peft.tuners.lora pytest rich.table safetensors.torch scipy "
    "sklearn.datasets tyro"
)
TIMEOUT = 300  # seconds of one mutation

CLOSED, CONTRACTS = "tests/test_closed_forms.py", "tests/test_contracts.py"
GRADIENT = f"{CLOSED}::test_student_gradient"
DISCRETE, CONTINUOUS = f"{CLOSED}::TestDiscreteConsistency", f"{CLOSED}::TestContinuousConsistency"
BY_HAND, GAN, FAKE = (f"{CONTRACTS}::{name}" for name in ("TestByHand", "TestGan", "TestFakeTurn"))
SCHEDULE, DENOISER, STUDENT = "tests/test_schedule.py", "tests/test_denoiser.py", "tests/test_student.py"
LOSSES, DRAW, EMA = "tests/test_losses.py", "tests/test_draw.py", "tests/test_ema.py"
STAGED = "tests/test_times.py"
OPTIMUM, PAIRS = "tests/test_regression.py", "tests/test_pairs.py"
MEMORY = "tests/test_memory.py"
EXPORTED = "tests/test_recipes.py::test_the_average_is_exported"
REHEARSAL = "tests/test_rehearsal.py"
METRICS, PAGE = "tests/test_metrics.py", "tests/test_page.py"
STATISTICS = "test_a_reference_that_is_no_statistics_is_refused"
TRAINER, RECIPES, ROLES = "tests/test_trainer.py", "tests/test_recipes.py", "tests/test_roles.py"


@dataclass(frozen=True)
class Mutation:
    """In `file` (below the group's folder), `old` becomes `new`; `tests` should notice. more: (file, old, new)."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    more: tuple[tuple[str, str, str], ...] = ()

    @property
    def changes(self):
        return ((self.file, self.old, self.new), *self.more)


def m(name, file, old, new, *tests, more=()):
    return Mutation(name, f"{file}.py", old, new, tests, more)


SIDA, JUDGE = "distill/methods/sida", "tests/methods/test_sida.py"
SID, DMD2, VSD = "distill/methods/sid", "distill/methods/dmd2", "distill/methods/vsd"
DISC = "distill/disc"
LCD, SCM = "distill/methods/lcd", "distill/methods/scm"
WEIGHT, WEIGHED = "distill/weight", "tests/methods/test_weight.py"
ODE, LOOKS, PAIR = "distill/methods/regression", "pipelines/perceptual", "distill/data/pairs"
AVERAGE, MEAN, RCGM, TWIN, BOOT, SIGN = (
    "distill/average",
    *(f"distill/methods/{name}" for name in ("meanflow", "rcgm", "twinflow", "boot", "sign")),
)
DMD, DI, F_DISTILL, LADD = (f"distill/methods/{name}" for name in ("dmd", "diff_instruct", "f_distill", "ladd"))
SPRINT, RUN_UP = "distill/methods/sprint", "tests/methods/test_sprint.py"
SLCT, RCM = "distill/methods/slct", "distill/methods/rcm"
PCM, TCD = "distill/methods/pcm", "distill/methods/tcd"
CT, CURRICULUM = "distill/methods/ct", "distill/curriculum"
TCM, TRUNCATED = "distill/methods/tcm", "tests/methods/test_tcm.py"
TSM, DISBACK, DENOISE = (f"distill/methods/{name}" for name in ("tsm", "disback", "denoise"))
PHASED, INTERVAL = "distill/methods/phased", "distill/interval"
REWARD, CLIP, WRAPPED = "distill/methods/reward", "pipelines/reward", "distill/methods/wrapped"
REWARDED = "tests/methods/test_reward.py"
PROXIED, PROXY = "distill/methods/proxied", "tests/methods/test_proxied.py"
FORGET, FORGOTTEN = "distill/methods/forget", "tests/methods/test_forget.py"
CONTROL, SHOWN = "pipelines/control", "tests/test_control.py"
NCT, DUAL, TOLD = "distill/methods/nct", "distill/dual", "tests/methods/test_nct.py"
SKIPS, SKIP = "pipelines/skips", "tests/methods/test_skips.py"
PAG, PAGS = "pipelines/pag", "tests/methods/test_pag.py"
PAG_LAW, PAG_SD = f"{PAGS}::test_students_variance", f"{PAGS}::test_formula[sd]"
PAG_SAME, PAG_ROLES = f"{PAGS}::test_is_diffusers_pag[", f"{PAGS}::test_no_other_role_is_perturbed"
PAIRWISE, OFFLINE = "distill/methods/pso", "distill/methods/pso_offline"
STEPPING, TUNED = "distill/student", "tests/methods/test_pso.py"
NEGATIVE, TURNED = "pipelines/negative", "tests/methods/test_negative.py"
HEEDING, SUN, OFFSET = "distill/negative", "distill/methods/sun", "tests/methods/test_sun.py"
SOLVER, STITCH = "distill/solver", "pipelines/stitch"
TURNS, STITCHED = "tests/test_turns.py", "tests/test_stitch.py"
NASA = "distill/methods/nasa"
ENTROPIC, SPREAD = "distill/methods/entropic", "tests/methods/test_entropic.py"
OF = "tests/methods/test_"  # NAME.py
ENDS, MEANS, TWINS, BOOTS, SIGNS = (f"{OF}{name}.py" for name in "average meanflow twinflow boot sign".split())
NO_GRAD, GRAD = "with torch.no_grad():\n            x_t = path", "with torch.enable_grad():\n            x_t = path"
PREDICTED = tuple(f"with torch.{mode}_grad():\n            real, fake, h" for mode in ("no", "enable"))  # of DMD2
KEEP_G = ("distill/losses.py", "    g = g.detach()\n", "")
# fmt: off
# fmt: off
MUTATIONS = {
    "SiD": (
        m("sign of the loss", SID, "self.gain * reduce(", "-self.gain * reduce(", GRADIENT),
        m("sign of 1 - alpha", SID, "(1 - self.alpha)", "(1 + self.alpha)", GRADIENT),
        m("2 alpha", SID, "(1 - self.alpha) * delta", "(1 - 2 * self.alpha) * delta", GRADIENT),
        m("teacher without gradient", SID, "k4)(x_t, t, c).x0", "k4)(x_t, t, c).x0.detach()", GRADIENT),
        m("fake score without gradient", SID, "fake = pred.x0\n", "fake = pred.x0.detach()\n", GRADIENT),
        m("samples without gradient", SID, "(fake3 - x)", "(fake3 - x.detach())", GRADIENT),
        m("mean for sum", SID, "reduce(loss, self.reduction)", 'reduce(loss, "mean")', GRADIENT),
        m("weight left out", SID, "w = 1 / normaliser(x, real) if", "w = 1.0 if", BY_HAND),
        m("weight from the fake score", SID, "normaliser(x, real)", "normaliser(x, fake)", BY_HAND),
        m("k1 and k2 exchanged", SID, "(_, k2, k3, k4)", "(k2, _, k3, k4)", BY_HAND),
        m("k3 forgotten", SID, "fake3 = fake if k3 == k2 else Guided(nets.fake, k3)(x_t, t, c).x0", "fake3 = fake",
          BY_HAND),
        m("fake trained under k2", SID, "Guided(fake, self.kappa[0])", "Guided(fake, self.kappa[1])", FAKE),
        m("no conditions dropped", SID, 'draw.player == "fake"', "False", FAKE),
        m("conditions dropped for the teacher", SID, "self.kappa[:3]", "self.kappa", FAKE),
        m("student before the fake", SID,
          'Update("fake", self.fake_loss), Update("student", self.student_loss, self.fake_steps)',
          'Update("student", self.student_loss, self.fake_steps), Update("fake", self.fake_loss)',
          f"{TRAINER}::test_order_of_turns"),
        m("fake on the wrong level", SID, "fake.path.diffuse(x, eps, t), t, c)",
          "fake.path.diffuse(x, eps, t), 1 - t, c)", FAKE),
    ),
    "Rewarded": (
        m("sign of the reward", REWARD, "d = -r if", "d = r if", REWARDED),
        m("sign of the clamped reward", REWARD, "(self.clamp - r).relu()", "(r - self.clamp).relu()", REWARDED),
        m("clamp of the mean", REWARD, "(self.clamp - r).relu()", "(self.clamp - r.mean()).relu()", REWARDED),
        m("reward without gradient", REWARD, "r = self.score(*said[-1], nets, batch, draw)",
          "r = self.score(*said[-1], nets, batch, draw).detach()",
          REWARDED),
        m("sum over the batch", REWARD, "d.mean()", "d.sum()", REWARDED),
        m("weight does not fall", REWARD, "max(0.0, 1 - draw.step / self.until)", "1.0", REWARDED),
        m("prompt, not caption", REWARD, "self.said.append((pred.x0, c))", "self.said.append((pred.x0.detach(), c))",
          REWARDED),
        m("wrapper forgets the role", WRAPPED, "return self.base.roles", 'return ("fake",)', REWARDED),
        m("every player rewarded", WRAPPED, 'f"{update.player}_term"', '"student_term"', REWARDED),
        m("pictures clamped", CLIP, "(pictures(x), (size", "(pictures(x).clamp(-1, 1), (size", REWARDED),
        m("CLIP's shift forgotten", CLIP, "/ 2 + 0.5 - seen", "- seen", REWARDED),
        m("CLIP without gradient", CLIP, "F.interpolate(pictures(x)", "F.interpolate(pictures(x).detach()", REWARDED),
        m("shares left out", CLIP, "share.log() - (mean.T * w)", "share.log() + (mean.T * w)", REWARDED),
        m("row of the prompt before it was emptied", "distill/data/feed",
          "        rows = torch.where(empty, len(self.text) - 1, rows)\n        if self.rule is None:\n"
          "            return self.text.read(rows.tolist())",
          "        if self.rule is None:\n"
          "            return self.text.read(torch.where(empty, len(self.text) - 1, rows).tolist())",
          REWARDED),
        m("reward of what is forgotten", "distill/data/feed", '{"prompt": told}', '{"prompt": rows}',
          "tests/test_cache.py::TestWhatIsRead::test_words_to_forget"),
    ),
    "Proxied": (
        m("sign of the preference", PROXIED, "d, want = (found[a] - found[b])", "d, want = (found[b] - found[a])",
          PROXY),
        m("the reward itself", PROXIED, "return self.proxy([x], c, nets, draw)[0]", "return judge(nets)(x, c)", PROXY),
        m("proxy without gradient", PROXIED, "return self.proxy([x], c, nets, draw)[0]",
          "return self.proxy([x], c, nets, draw)[0].detach()", PROXY),
        m("noise of one's own", PROXIED, '["proxy"] * n', '[f"proxy{i}" for i in range(n)]', PROXY),
        m("real images of other prompts", PROXIED, "(c or {}).get(k) is v for", "(c or {}).get(k) is not None for",
          PROXY),
        m("the same sample twice", PROXIED, 'draw.apart("proxy"))', "draw)", PROXY),
        m("proxy never moved", PROXIED, "return [one for update in updates for one in (update, own(update))]",
          "return updates", PROXY),
        m("its turn moves the target, too", "distill/trainer",
          '                if hasattr(method, "after"):\n                    method.after(nets)\n',
          '            if hasattr(method, "after"):\n                method.after(nets)\n', PROXY),
        m("fake forgets the proxy", PROXIED, "return total + more, logs | own", "return total, logs | own", PROXY),
        m("moved by the student", "distill/roles", '"proxy": "fake"', '"proxy": "student"',
          f"{TRAINER}::test_every_method_moves_its_roles"),
    ),
    "TCM": (
        m("frozen above, student below", TCM, "ratio(t) < self.start", "ratio(t) >= self.start", TRUNCATED),
        m("all targets frozen", TCM, "nets.target(x, t, c).x0, super().f(nets, x, t, c)",
          "nets.target(x, t, c).x0, nets.target(x, t, c).x0", TRUNCATED),
        m("means of all samples", TCM, "self.weight / (rho or 1.0) + (1 - bound) / (1 - rho)",
          "self.weight + (1 - bound)", TRUNCATED),
        m("nobody at the boundary", TCM, "torch.where(self.bound(draw), start, t.maximum(start))", "t.maximum(start)",
          TRUNCATED),
        m("levels below s'", TCM, "t.maximum(start))", "t)", TRUNCATED),
        m("law cut on one side", "distill/times", "first + (last - first) * u", "first + (1 - first) * u", TRUNCATED),
        m("distance of s' unweighted", TCM, "super().far(delta, draw) * share", "super().far(delta, draw)",
          TRUNCATED),
    ),
    "NCT": (
        m("target with gradient", NCT, "with torch.no_grad():\n            target", "if True:\n            target",
          f"{TOLD}::test_gradient"),
        m("levels exchanged", NCT, "target = f(k)", "target = f(k + 1)", f"{TOLD}::test_gradient",
          more=((f"{NCT}.py", "f(k + 1) - target", "f(k) - target"),)),
        m("boundary at the noisy level", NCT, "f(0 * k) - x", "f(k) - x", f"{TOLD}::test_gradient"),
        m("noise that is no unit noise", NCT, "(1 - s**2).sqrt() * z", "(1 - s) * z", f"{TOLD}::test_gradient"),
        m("lambda left out", NCT, "consistency + dual.value * boundary", "consistency + boundary",
          f"{TOLD}::test_without_its_constraint_it_collapses"),
        m("sign of the dual step", DUAL, "rate * (mean - bound)).clamp", "rate * (bound - mean)).clamp",
          f"{TOLD}::test_multiplier"),
        m("lambda below 0", DUAL, ".clamp(min=0)", "", f"{TOLD}::test_multiplier"),
        m("a skipped update counts", DUAL, "if step != self.at:", "if self.at is None:", f"{TOLD}::test_multiplier"),
        m("the last micro-batch counts", DUAL, "torch.stack(self.losses).mean()", "self.losses[-1]",
          f"{TOLD}::test_multiplier"),
        m("lambda is not kept", DUAL, 'self.register_buffer("value", torch.tensor(float(value)), persistent=False)',
          "self.value = torch.tensor(float(value))", f"{TOLD}::test_lambda_survives_a_checkpoint"),
        m("the base trains too", "distill/lora", "found = shared(net).requires_grad_(False)",
          "found = copy.deepcopy(net).requires_grad_(True)", f"{TOLD}::test_only_the_adapter_is_trained"),
    ),
    "control": (
        m("middle left out", CONTROL, "return out + found.pop()", "return out + 0 * found.pop()",
          f"{SHOWN}::test_features_go_where_diffusers_puts_them"),
        m("features on the skips after them", CONTROL, "for _ in skips][::-1]", "for _ in skips]",
          f"{SHOWN}::test_features_go_where_diffusers_puts_them"),
        m("the picture stays", CONTROL, "for handle in handles:\n            handle.remove()", "pass",
          f"{SHOWN}::test_features_go_where_diffusers_puts_them"),
        m("input of a finished student not scaled", "pipelines/scheduler",
          '"TCDScheduler":\n            calls["scale"] = 1.0',
          '"TCDScheduler":\n            pass',
          f"{SHOWN}::test_a_finished_student_is_called_as_it_was"),
        m("noise of a finished student", "pipelines/scheduler", '"renoise": "fresh"}',
          '"renoise": "ddim"}', f"{SHOWN}::test_a_finished_student_is_called_as_it_was"),
        m("edges that are thick", CONTROL, "(size > behind) & (size >= ahead)", "size > 0", f"{SHOWN}::test_canny"),
        m("every weak edge", CONTROL, "weak * F.max_pool2d(edges, 3, 1, 1)", "weak", f"{SHOWN}::test_canny"),
    ),
    "Forgetting": (
        m("teacher told the class itself", FORGET, "self.rule(c))", "c)", FORGOTTEN),
        m("rule for student and fake", FORGET, 'relabel(batch["c"], self.forget, draw)}',
          'self.rule(relabel(batch["c"], self.forget, draw))}', FORGOTTEN),
        m("main batch of what is forgotten", FORGET, "        if self.keep:\n", "        if False:\n", FORGOTTEN),
        m("words as they are", FORGET, "{key.removeprefix(OVERRIDE): value", "{key: value", FORGOTTEN),
        m("first batch of words twice", FORGET, 'batch.get("forget_c") or', 'batch["c"] if "forget_c" in batch else',
          FORGOTTEN),
        m("any prompt forgotten", "distill/data/feed", "(rule != torch.arange(len(rule)))",
          "(rule >= 0)", "tests/test_cache.py::TestWhatIsRead::test_words_to_forget"),
        m("null is not told as null", "distill/data/__init__", "(teacher.denoiser.null, teacher.denoiser.null)",
          "(teacher.denoiser.null, {})", "tests/test_cache.py::TestWhatIsRead::test_words_to_forget"),
        m("forgetting in full", FORGET, "weight * forgetting,", "forgetting,", FORGOTTEN),
        m("sign of forgetting", FORGET, "total + weight", "total - weight", FORGOTTEN),
        m("rule the wrong way", FORGET, "torch.where(label == old, new,", "torch.where(label == new, old,", FORGOTTEN),
        m("samples without gradient", FORGET, 'enabled(draw.player == "student")', "enabled(False)", FORGOTTEN),
        m("samples of the first batch", FORGET, "x_f = self.base.sample(nets, second, draw)", "x_f = x", FORGOTTEN),
    ),
    "Entropic": (
        m("1 + lambda", ENTROPIC, "k=1 - self.entropy", "k=1 + self.entropy", SPREAD),
        m("lambda for 1 - lambda", ENTROPIC, "k=1 - self.entropy", "k=self.entropy", SPREAD),
        m("teacher guided, too", ENTROPIC, "replace(nets, fake=", "replace(nets, teacher=Scaled(**vars(nets.teacher), "
          "k=1 - self.entropy), fake=", SPREAD),
        m("no conditions dropped", ENTROPIC, "< self.p_drop", "< 0", SPREAD),
        m("images keep theirs", ENTROPIC, 'for key in ("c", "real_c")', 'for key in ("c",)', SPREAD),
        m("features of no condition", ENTROPIC, "return Guided(self.bare, self.k).tapping(x, t, c, taps)",
          "return Guided(self.bare, self.k).tapping(x, t, self.null, taps)", SPREAD),
    ),
    "negative prompts": (
        m("sign of NASA", HEEDING, "z - self.alpha", "z + self.alpha", TURNED),
        m("scale of NAG", NEGATIVE, "(self.scale - 1) * z_neg", "self.scale * z_neg", TURNED),
        m("always the 2-norm", NEGATIVE, "vector_norm(one, self.norm,", "vector_norm(one, 2,", TURNED),
        m("blend the other way", NEGATIVE, "self.blend * far + (1 - self.blend) * z",
          "(1 - self.blend) * far + self.blend * z", TURNED),
        m("prompt against itself", HEEDING, "self.rule(z, hear(other))", "self.rule(z, hear(text))", TURNED),
        m("padding is heard", NEGATIVE, "words if mask is None else", "words if True else", TURNED),
        m("layers stay as they are", NEGATIVE, "layer.processor = processor", "pass", TURNED),
    ),
    "SUN": (
        m("sign of the guidance", SUN, "self.guidance)\n", "-self.guidance)\n", OFFSET),
        m("teacher against its own null", SUN, "replace(nets.teacher, null={k: other[k] for k in nets.teacher.null})",
          "nets.teacher", OFFSET),
        m("a sample against itself", HEEDING, "+ 1 + draw.integers", "+ draw.integers", OFFSET),
        m("more steps with gradient", SUN, "with torch.no_grad():\n            many", "if True:\n            many",
          OFFSET),
        m("one student step fewer", SUN, "jump(student(jump(pred, path, u), u, told), path, s)", "jump(pred, path, s)",
          OFFSET),
        m("steps without the negative prompt", SUN, "student(x_t, t, told)\n", "student(x_t, t, c)\n", OFFSET),
        m("weight of MSC left out", SUN, "self.msc * (logs", "(logs", OFFSET),
        m("norm over the batch", HEEDING, "dim=(1, 2), keepdim", "dim=(0, 1, 2), keepdim", OFFSET),
        m("sign of the offset", HEEDING, "z - attn.negative.minus(z, other, hear) + attn",
          "z + attn.negative.minus(z, other, hear) - attn", OFFSET),
        m("not rescaled", HEEDING, "gain * u)", "u)", OFFSET),
        m("the public code's start", HEEDING, "like.new_zeros(like.shape[1])", "like.new_ones(like.shape[1])", OFFSET),
        m("negative prompt in both branches", HEEDING, "plus(z, text, hear)", "plus(z, other, hear)", OFFSET),
        m("network's own keys and values", HEEDING, "hear(text, to_k=self.to_k, to_v=self.to_v)", "hear(text)", OFFSET),
        m("mask of the prompt for both", HEEDING, "(mask[..., :n], mask[..., n:])", "(mask[..., :n], mask[..., :n])",
          OFFSET),
        m("all is trained", HEEDING, "adapt(shared(backbone.requires_grad_(False)), length)",
          "adapt(shared(backbone.requires_grad_(True)), length)", OFFSET),
        m("guidance hears it twice", NEGATIVE, "if guided:", "if False:", OFFSET),
    ),
    "NASAT": (
        m("fake is told, too", NASA, "replace(nets, teacher=",
          "replace(nets, fake=replace(nets.fake, null=other), teacher=", OFFSET),
        m("teacher keeps its null condition", NASA, "self.alpha and (null", "False and (null", OFFSET),
        m("student is not told", NASA, '{"c": against(c, another(c, draw))}', "{}", OFFSET),
        m("another negative prompt for the teacher", NASA, 'another(batch["c"], draw)',
          'another(batch["c"], draw.apart("x"))', OFFSET),
        m("always in full", NASA, 'draw.index("nasa", 1 << 20) / (1 << 20)', "1.0", OFFSET),
    ),
    "PAG": (
        m("sign", "distill/guidance", "self.s * (out", "-self.s * (out", PAG_LAW),
        m("under guidance, from the null branch", "distill/guidance", "away.term(cond,", "away.term(empty,", PAG_SD),
        m("guidance multiplies it", "distill/guidance", "out + away.term(cond, x, t, c) if away",
          "out + w * away.term(cond, x, t, c) if away", PAG_SD),
        m("both branches perturbed", "distill/guidance", "ask = away.alone if away else self.base", "ask = self.base",
          PAG_SD),
        m("not itself but a better one", "distill/guidance", "replace(self, net=self.worse).alone", "self.alone",
          PAG_LAW),
        m("the teacher's own processors", PAG, "made = shared(net)", "made = net", PAG_ROLES),
        m("weights of its own", PAG, "made = shared(net)", "made = __import__('copy').deepcopy(net)",
          PAG_ROLES),
        m("no output projection", PAG, "attn.to_out[1](attn.to_out[0](attn.to_v(x)))", "attn.to_v(x)",
          PAG_SAME + "sd]"),
        m("the text unseen", PAG, "mask[: self.n, : self.n]", "mask[: self.n]", PAG_SAME + "sd3]"),
        m("tokens do not see themselves", PAG, "mask.fill_diagonal_(0)", "mask", PAG_SAME + "sd3]"),
        m("not recomputed", "distill/memory", "{**_denoisers(nets), **nets.frozen()}", "_denoisers(nets)",
          PAG_ROLES),
        m("sampled without it", "eval/generate", "if self.pag_scale:\n", "if False:\n", f"{PAGS}::test_generate"),
        m("a run without it", "pipelines/run", "pag.guide(nets, config.pag_scale,", "pag.guide(nets, 0.0,",
          f"{PAGS}::test_a_run"),
        m("not in the plan", "pipelines/plan", "pag.guide(nets, self.config.pag_scale,", "pag.guide(nets, 0.0,",
          f"{PAGS}::test_costs_one_pass_more"),
    ),
    "Skip-Tuning": (
        m("the other end first", SKIPS, "reversed(rho)", "rho", f"{SKIP}::test_every_skip_has_its_own_factor"),
        m("every block the same", SKIPS, "i += len(shares)", "i += 0", f"{SKIP}::test_every_skip_has_its_own_factor"),
        m("the top is never reached", SKIPS, "i / max(k, 1)", "i / (k + 1)", f"{SKIP}::test_line"),
        m("stays on", SKIPS, "handle.remove()", "pass", f"{SKIP}::test_off"),
        m("not in the request", "eval/generate", "            **skips,\n", "", f"{SKIP}::test_generate"),
        m("asked for in vain", "eval/generate", "tune(one, line(one, self.skip_tuning))", "pass",
          f"{SKIP}::test_generate"),
    ),
    "SiDA": (
        m("sign of the student's GAN", SIDA, "F.softplus(-self.logits(", "F.softplus(self.logits(", JUDGE),
        m("reals called fakes", SIDA, "F.softplus(low), x) + self.fused(F.softplus(-high)",
          "F.softplus(-low), x) + self.fused(F.softplus(high)", JUDGE),
        m("GAN without gradient", SIDA, "features[0].to(x).mean(1)", "features[0].to(x).mean(1).detach()", JUDGE),
        m("sum over channels", SIDA, "features[0].to(x).mean(1)", "features[0].to(x).sum(1)", JUDGE),
        m("SiD's weight left out", SIDA, "(w * f)", "(0 * w + f)", JUDGE),
        m("every sample by itself", SIDA, 'mean() if self.fusion == "batch" else', "mean() if False else", JUDGE),
        m("once, not for every element", SIDA, "f.expand_as(x), self.reduction", "f, self.reduction", JUDGE),
        m("EDM's weight left out", SIDA, "fake.sigma_d**-2 + fake.path.ratio(t) ** -2", "0 * t + 1.0", JUDGE),
        m("both losses in full", SIDA, "self.mix * (loss", "(loss", JUDGE),
        m("reals at another level", SIDA, "diffuse(y, eps, t), t,", "diffuse(y, eps, t), 1 - t,", JUDGE),
        m("reals under other labels", SIDA, 'batch.get("real_c", c)', "c", JUDGE),
        m("labels not paired", SIDA, "paired = self.pairs and", "paired = False and", JUDGE),
        m("scan keeps a dropped label", SIDA, 'batch["real_c"] = batch["c"]', "pass", JUDGE),
        m("GAN from the start", SIDA, "draw.step < self.gan_start", "False", JUDGE),
        m("student from the start", SIDA, "start=self.start", "start=0", JUDGE),
        m("features of no condition", "distill/guidance", "[: len(x)] for name", "[-len(x) :] for name", JUDGE),
        m("gradient not clipped by its entries", "distill/trainer", "(players[player], limit)",
          "(players[player], 1e9)", JUDGE),
        m("logits not clamped", SIDA, ".clamp(-most, most)", "", JUDGE),
    ),
    "DisBack": (
        m("sign of g", DMD2, "g = h * (fake - real)", "g = h * (real - fake)", f"{OF}disback.py::test_gradient"),
        m("gradient through the scores", DMD2, *PREDICTED, f"{OF}disback.py::test_gradient", more=(KEEP_G,)),
        m("a teacher too long", DISBACK, "step // self.interval", "(step - 1) // self.interval",
          f"{OF}disback.py::test_gradient"),
        m("forwards", DISBACK, "len(nets.past.folders) - 2 - step // self.interval", "step // self.interval",
          f"{OF}disback.py::TestTraining"),
        m("from the last of all", DISBACK, "len(nets.past.folders) - 2", "len(nets.past.folders) - 1",
          f"{OF}disback.py::TestTraining"),
        m("the teacher left out", DISBACK, "if i >= 0 else nets", "if i >= -1 else nets",
          f"{OF}disback.py::TestTraining"),
        m("the past not asked", DISBACK, "self.towards(nets, draw.step), batch", "nets, batch", f"{OF}disback.py"),
        m("the student learns too", DISBACK, 'return [Update("fake", self.fake_loss)]',
          'return [*DMD2(gan=0, gan_fake=0, every=1).updates()]', f"{OF}disback.py::TestFarAway"),
        m("fake score from the teacher", "distill/roles", 'init=fake.init or f"{folders[-1]}"', "init=fake.init",
          f"{OF}disback.py::TestTraining"),
    ),
    "Multi-Student": (
        m("guidance forgotten", TSM, "Guided(nets.teacher, self.guidance)(x_t", "nets.teacher(x_t", f"{OF}tsm.py"),
        m("sign of the target", TSM, ".out - target)", ".out + target)", f"{OF}tsm.py"),
        m("clean samples for the target", TSM, "self.guidance)(x_t, t, c).out", "self.guidance)(x, t, c).out",
          f"{OF}tsm.py"),
        m("target at another level", TSM, "self.guidance)(x_t, t, c).out", "self.guidance)(x_t, 1 - t, c).out",
          f"{OF}tsm.py"),
        m("labels of all parts", "distill/data/__init__", "part.to(draw.device)[draw.integers(\"label\", len(part))]",
          "draw.integers(\"label\", 10)", "tests/test_experts.py::test_one_part_is_all"),
        m("labels to the wrong student", "pipelines/experts", "= k\n    return which", "= 1 - k\n    return which",
          "tests/test_experts.py::test_students_of_parts"),
        m("the first student for all", "pipelines/experts", "(which == k).reshape", "(which < 0).reshape",
          "tests/test_experts.py::test_students_of_parts"),
    ),
    "PSO": (
        m("worse preferred", PAIRWISE, "F.softplus(-self.beta", "F.softplus(self.beta", TUNED),
        m("no preference", PAIRWISE, "gap(reward).sign()", "1", TUNED),
        m("size of the reward", PAIRWISE, "gap(reward).sign()", "gap(reward)", TUNED),
        m("reference forgotten", PAIRWISE, "nets.finished.step", "nets.student.step", TUNED),
        m("not clipped", PAIRWISE, "h.clamp(log1p(-self.eps), log1p(self.eps))", "1 * h", TUNED),
        m("clipped above alone", PAIRWISE, "h.clamp(log1p(-self.eps), ", "h.clamp(None, ", TUNED),
        m("sum over elements", PAIRWISE, "flatten(1).mean(1)", "flatten(1).sum(1)", TUNED),
        m("sigma, not its square", PAIRWISE, "/ sigma**2", "/ sigma", TUNED),
        m("a step left out", PAIRWISE, "range(x.shape[2] - 2)", "range(x.shape[2] - 3)", TUNED),
        m("pairs of one noise", PAIRWISE, 'draw.apart("second")', "draw", TUNED),
        m("the reward of noise", PAIRWISE, "walks[:, -1].chunk", "walks[:, -2].chunk", TUNED),
        m("one map of noise", STEPPING, "tuple(x.shape)).to(x)", "tuple(x.shape)).to(x)[:1]", TUNED),
        m("hinge the other way", OFFLINE, "self.beta * gap) + ", "self.beta * -gap) + ", TUNED),
        m("winners kept, not losers", OFFLINE, "self.gamma * worse", "self.gamma * better", TUNED),
        m("data is worse", OFFLINE, "self.beta * (gap - ", "-self.beta * (gap - ", TUNED),
        m("all of the loser", OFFLINE, "gap = better - self.neg_defactor * worse", "gap = better - worse", TUNED),
        m("reference of the student", OFFLINE, "errors(nets.teacher)", "errors(nets.student.denoiser)", TUNED),
        m("samples of the student itself", OFFLINE, "replace(nets, student=nets.finished)", "nets", TUNED),
        m("no weight", OFFLINE, "(alpha / sigma).to(y) ** 2 * ", "", TUNED),
        m("noise of their own", OFFLINE, "for y in x.unbind(1)]", "for y, eps in zip(x.unbind(1), (eps, -eps))]",
          TUNED),
    ),
    "PhasedDMD": (
        m("sign of g", DMD2, "g = h * (fake - real)", "g = h * (real - fake)", f"{OF}phased.py::TestClosedForms"),
        m("gradient through the scores", DMD2, *PREDICTED, f"{OF}phased.py::TestClosedForms", more=(KEEP_G,)),
        m("x_s for x_0 in the target", INTERVAL,
          "x0 / a_s - self.alpha * s_s**2 / (a_s**2 * b) * eps, self.sigma / b * eps",
          "x0, eps", f"{OF}phased.py::TestClosedForms"),
        m("noise since s for all noise", INTERVAL, "self.sigma / b * eps)", "eps)", f"{OF}phased.py::TestClosedForms"),
        m("sign of the anchor's part", INTERVAL, "x0 / a_s - self.alpha", "x0 / a_s + self.alpha",
          f"{OF}phased.py::TestClosedForms"),
        m("x_0 read for x_s", INTERVAL,
          "return (self.a * s_s**2 * self.x + a_s * self.b**2 * super().x0) / self.sigma**2",
          "return super().x0", f"{OF}phased.py::TestClosedForms"),
        m("weight left out", INTERVAL, "(self.clamp * torch.as_tensor(self.b) ** 2).clamp(max=1)",
          "torch.ones_like(torch.as_tensor(self.b))", f"{OF}phased.py::test_weight_near_the_boundary"),
        m("levels below s", INTERVAL, "self.s + (1 - self.s) * u.double()", "u.double()",
          f"{OF}phased.py::TestClosedForms"),
        m("law of the whole path", INTERVAL, "lambda u: low + (1 - low) * u", "lambda u: u",
          f"{OF}phased.py::test_laws_above_the_boundary"),
        m("teacher of the whole path", PHASED, "teacher=nets.teacher.on(path), ", "", f"{OF}phased.py"),
        m("ends at x_0", PHASED, "draw.index(\"steps\", last - first), nets.student.end)",
          "draw.index(\"steps\", last - first))", f"{OF}phased.py::TestTraining"),
        m("second phase without the first", "distill/student", "if i < first else self.denoiser",
          "if i < 0 else self.denoiser", f"{OF}phased.py"),
    ),
    "DMD2": (
        m("sign of g", DMD2, "g = h * (fake - real)", "g = h * (real - fake)", GRADIENT),
        m("sum for mean", DMD2, "reduce(push(x, g), self.reduction)", 'reduce(push(x, g), "sum")', BY_HAND),
        m("normaliser left out", DMD2, "(normaliser(x, real) if self.normalise else 1.0)", "1.0", BY_HAND),
        m("normaliser of the fake", DMD2, "normaliser(x, real)", "normaliser(x, fake)", BY_HAND),
        m("gradient through the scores", DMD2, *PREDICTED, GRADIENT, more=(KEEP_G,)),
        m("teacher not guided", DMD2, "Guided(nets.teacher, self.guidance)(x_t", "nets.teacher(x_t", BY_HAND),
        m("fake guided", DMD2, "nets.fake(x_t, t, c).x0, 1.0",
          "Guided(nets.fake, self.guidance)(x_t, t, c).x0, 1.0", BY_HAND),
        m("GAN on the clean image", DISC, "path.diffuse(x, eps, u), u, c", "x, u, c", GAN),
        m("GAN told another level", DISC, "path.diffuse(x, eps, u), u, c", "path.diffuse(x, eps, u), 1 - u, c", GAN),
        m("GAN without gradient", DMD2, 'self.logits(x, c, nets, draw, "gan"',
          'self.logits(x.detach(), c, nets, draw, "gan"', GAN),
        m("sign of the GAN", DMD2, "loss + self.gan * ", "loss - self.gan * ", GAN),
        m("GAN weights exchanged", DMD2, "loss + self.gan_fake * ", "loss + self.gan * ", GAN),
        m("reals under the fakes' condition", DMD2, "merge(c, y_c)", "merge(c, c)", GAN),
        m("samples not reused", DMD2, "self.fake_loss, 1, True,", "self.fake_loss, 1, False,",
          f"{TRAINER}::test_samples_are_reused"),
        m("shared pass at other features", DMD2, "nets.disc(*features)", "nets.disc(0 * features[0])",
          "tests/test_ledger.py::TestShare"),
        m("walk that stands", DMD2, "if draw.late is None else draw.late", "if draw.late is None else 0",
          "tests/test_ledger.py::TestWalk"),
        m("every step", DMD2, "self.student_loss, self.every", "self.student_loss",
          f"{TRAINER}::test_order_of_turns"),
        m("always all steps", DMD2, 'draw.index("steps", len(nets.student.times))', "len(nets.student.times) - 1",
          f"{TRAINER}::test_calls_of_dmd2"),
        m("fake on the wrong level", DMD2, "tapping(x_t, t, c", "tapping(x_t, 1 - t, c", FAKE),
    ),
    "VSD": (
        m("PG-SB: a k of its own for the fake", VSD, "k_fake = k if",
          "k_fake = scale_of(self.guidance, draw, len(x)).flip(0) if", "tests/methods/test_negative.py"),
        m("sign of g", VSD, "push(x, w * (real - fake))", "push(x, -w * (real - fake))", GRADIENT),
        m("weight of the signal", VSD, "expand(sigma**2 / (", "expand(alpha**2 / (", GRADIENT),
        m("sigma for sigma^2", VSD, "expand(sigma**2 / (", "expand(sigma / (", GRADIENT),
        m("mean for sum", VSD, "self.reduction), scores(eps", '"mean"), scores(eps', GRADIENT),
        m("gradient through the scores", VSD, NO_GRAD, GRAD, GRADIENT, more=(KEEP_G,)),
        m("fake not guided", VSD, "k_fake = k if self.fake_guidance is None else self.fake_guidance", "k_fake = 1.0",
          BY_HAND),
        m("ESD's guidance to the teacher", VSD, "Guided(nets.teacher, k)(", "Guided(nets.teacher, k_fake)(",
          f"{CLOSED}::TestEntropic"),
        m("one random guidance for all", VSD, "k = scale_of(self.guidance, draw, len(x))",
          "k = scale_of(self.guidance, draw, len(x))\n        k = k if isinstance(k, float) else k[:1].expand(len(x))",
          BY_HAND),
        m("no conditions dropped", VSD, "        if self.needs:\n            c = drop",
          "        if False:\n            c = drop", FAKE),
        m("fake on the wrong level", VSD, "nets.fake(path.diffuse(x, eps, t), t, c)",
          "nets.fake(path.diffuse(x, eps, t), 1 - t, c)", FAKE),
        m("fake on fresh samples", VSD, "self.fake_loss, reuse=True", "self.fake_loss",
          f"{TRAINER}::test_samples_are_reused"),
    ),
    "LCD": (
        m("sign of the target", LCD, "torch.sub(*self", "torch.add(*self", DISCRETE),
        m("target at t", LCD, "x_s, s, e, also)", "x_s, t, e, also)", DISCRETE),
        m("target at x_t", LCD, "student, x_s, s, e, also", "student, x_t, s, e, also", DISCRETE),
        m("target from the student", LCD, "nets.target or student", "student", BY_HAND, f"{CONTRACTS}::TestPushed"),
        m("target with gradient", LCD, "            target = self.f(nets.target or student, x_s, s, e, also)\n",
          "        target = self.f(nets.target or student, x_s, s, e, also)\n", f"{CONTRACTS}::TestTargets"),
        m("no boundary", LCD, "expand(t < 0.5 / self.N, x)", "expand(t < -1, x)", BY_HAND, DISCRETE),
        m("two steps of the grid", LCD, "self.time(i, nets)", "self.time((i - 1).clamp(min=0), nets)",
          DISCRETE, BY_HAND),
        m("teacher not guided", LCD, "(Guided(nets.teacher, w), x_t", "(nets.teacher, x_t", BY_HAND),
        m("student not told", LCD, "self.f(student, x_t, t, e, also)", "self.f(student, x_t, t, e, c)", BY_HAND),
        m("sum for mean", LCD, "reduce(loss, self.reduction)", 'reduce(loss, "sum")', BY_HAND, DISCRETE),
        m("average the wrong way", LCD, "net, self.target_ema)", "net, 1 - self.target_ema)", BY_HAND),
        m("target never moves", LCD, "if nets.target is not None", "if False", BY_HAND),
    ),
    "MeanFlow": (
        m("sign of the derivative", MEAN, "+ warm * expand(t - r, x)", "- warm * expand(t - r, x)", MEANS),
        m("r - t", MEAN, "expand(t - r, x)", "expand(r - t, x)", MEANS),
        m("target with gradient", MEAN, "g = F.detach() - v", "g = F - v", MEANS),
        m("along t alone", MEAN, "(v, torch.ones_like(t))", "(0 * v, torch.ones_like(t))", MEANS),
        m("along x alone", MEAN, "(v, torch.ones_like(t))", "(v, torch.zeros_like(t))", MEANS),
        m("sign of v", MEAN, "v = eps - x if", "v = x - eps if", MEANS),
        m("r above t", MEAN, "torch.maximum(a, b), torch.minimum(a, b)", "torch.minimum(a, b), torch.maximum(a, b)",
          MEANS),
        m("told t - r", MEAN, "average(net, x_t, t, r, c), (x_t", "average(net, x_t, t, t - r, c), (x_t", MEANS),
        m("teacher not guided", MEAN, "nets.teacher.on(PATH), w)", "nets.teacher.on(PATH), 1.0)", MEANS),
        m("dropped samples guided", MEAN, "inside & ~dropped)", "inside)", MEANS),
        m("guidance outside its interval", MEAN, "(t <= self.interval[1])", "(t <= 1)", MEANS),
        m("one law for both times", MEAN, "(self.end_times or self.times)", "self.times", MEANS),
        m("tangent of one size", MEAN, "g / g[0].numel() ** 0.5", "g", MEANS),
        m("floor forgotten", MEAN, "dim=1) + self.floor", "dim=1)", MEANS),
        m("told the end for nothing", "distill/student", "to and self.jumps", "False", MEANS, ENDS),
        m("embedding of the wrong ends", AVERAGE, "change[-1]", "0 * change[-1]", ENDS),
        m("weight with gradient", "distill/losses", "(size.detach() + floor) ** p", "(size + floor) ** p", MEANS),
        m("mean for sum", MEAN, ".flatten(1).sum(1)", ".flatten(1).mean(1)", MEANS),
        m("omega and kappa exchanged", AVERAGE, "omega * v + (1 - omega - kappa) * null + kappa * cond",
          "kappa * v + (1 - omega - kappa) * null + omega * cond", ENDS),
        m("not zero at zero", AVERAGE, "1 - phase.cos()", "phase.cos()", ENDS),
        m("told for good", AVERAGE, "            handle.remove()", "            pass", ENDS),
        m("target of one time", "distill/roles", "replace(nets.student.denoiser, net=twin(",
          "replace(teacher, net=twin(",
          ENDS),
    ),
    "Turns": (
        m("x of the other path", SOLVER, "denoiser=self.denoiser.on(path), t=float(t)", "t=float(t)", TURNS),
        m("time of the other path", SOLVER, "denoiser=self.denoiser.on(path), t=float(t)",
          "denoiser=self.denoiser.on(path)", TURNS),
        m("calls below the handover", SOLVER, "if call.level > level]", "if call.level >= level / 2]", TURNS),
        m("first calls kept", SOLVER, "rest = then[skip:]", "rest = then[max(0, skip - 1) :]", TURNS),
        m("other order", SOLVER, "[*before, *rest]", "[*rest, *before]", TURNS),
        m("a step too far", SOLVER, "times[:-1], times[1:], strict",
          "times[:-1], [*times[2:], times[-1]], strict", TURNS),
        m("scale forgotten", SOLVER, "if turns[0].scale is None else turns[0].scale", "", TURNS),
        m("noise of one name", "distill/student", "fresh(lambda x: self._noise(i,",
          "fresh(lambda x: self._noise(0,", TURNS),
        m("experts forgotten", "distill/student", "Call(self.at(i, to), t, step(i)", "Call(self.denoiser, t, step(i)",
          TURNS),
        m("no new noise", STITCH, "if self.solver is None and anew:", "if False:", STITCHED),
        m("unit noise of Euler's", STITCH, "scale = float(scheduler.scale_model_input(start, scheduler.timesteps[0]))",
          "scale = float(start)", STITCHED),
        m("base without guidance", STITCH, "denoiser = getattr(teacher.parts.family",
          "getattr(teacher.parts.family", STITCHED),
        m("levels of another grid", STITCH, "teacher.set_timesteps(scheduler, steps)",
          "scheduler.set_timesteps(steps)", STITCHED),
    ),
    "CFG++": (
        m("guided noise", SOLVER, "diffuse(pred.x0, empty.eps, s)", "diffuse(pred.x0, pred.eps, s)", TURNS),
        m("sample without guidance", SOLVER, "diffuse(pred.x0, empty.eps, s)", "diffuse(empty.x0, empty.eps, s)",
          TURNS),
        m("noise of the condition", "distill/guidance", 'half | {"out": empty})', 'half | {"out": cond})', TURNS),
        m("scale of 0 without guidance", SOLVER, "Guided(denoiser, 1.0)", "Guided(denoiser, 0.0)", TURNS),
        m("asks for no null condition", "distill/guidance", 'w == 1 and solver != "cfg++"', "w == 1", TURNS),
    ),
    "RCGM": (
        m("sign of v", RCGM, "/ self.step - v)", "/ self.step + v)", TWINS),
        m("target with gradient", RCGM, "with torch.no_grad():\n            target",
          "with torch.enable_grad():\n            target", TWINS,
          more=(("distill/methods/rcgm.py", "+ g.detach()).square()", "+ g).square()"),)),
        m("start not moved", RCGM, "x - self.step * v, t", "x, t", TWINS),
        m("moved the wrong way", RCGM, "x - self.step * v, t", "x + self.step * v, t", TWINS),
        m("jumps stay where they are", RCGM, "x, a, I = x - jump, b, I + jump", "a, I = b, I + jump", TWINS),
        m("target from the student", RCGM, "target = (nets.target or nets.student.denoiser)",
          "target = (nets.student.denoiser)", TWINS),
        m("target never moves", RCGM, "if nets.target is not None", "if False", TWINS),
        m("average the wrong way", "distill/ema", "apart(target, net), 1 - mu)", "apart(target, net), mu)", TWINS),
        m("g not clamped", RCGM, "g.clamp(-self.clamp, self.clamp)", "g", TWINS),
        m("weight the wrong way", RCGM, "(1 - (t - r)) * math.pi", "(t - r) * math.pi", TWINS),
        m("no steps to 0", RCGM, "draw.samples % 3 == 0, draw", "draw.samples % 3 == 7, draw", TWINS),
        m("c for c^2", RCGM, "self.c**2", "self.c", TWINS),
        m("kappa left out", RCGM, "guided(v, 1.0, self.kappa,", "guided(v, 1.0, 0.0,", TWINS),
        m("kappa at t = 1", RCGM, "(t < self.interval[1])", "(t <= self.interval[1])", TWINS),
    ),
    "TwinFlow": (
        m("sign of the descent", TWIN, "self.distance(x, -g", "self.distance(x, g", TWINS),
        m("twin under the positive sign", TWIN, "F = average(net, x_t, t, -t, c)", "F = average(net, x_t, t, t, c)",
          TWINS),
        m("twin learns data", TWIN, "F - (eps - x)", 'F - (eps - batch["real"])', TWINS),
        m("twin moves the samples", TWIN, 'self.noised(x.detach(), draw, "twin")', 'self.noised(x, draw, "twin")',
          TWINS),
        m("scores with gradient", TWIN, "with torch.no_grad():\n                x_u",
          "with torch.enable_grad():\n                x_u", TWINS,
          more=(("distill/methods/rcgm.py", "+ g.detach()).square()", "+ g).square()"),)),
        m("samples as data", TWIN, "average(net, x_u, u, u, c)", "average(net, x_u, u, 0 * u, c)", TWINS),
        m("rectify not clamped", TWIN, "-g.clamp(-self.clamp, self.clamp)", "-g", TWINS),
        m("weights exchanged", TWIN, 'self.twin * logs["twin"]', 'self.rectify * logs["twin"]', TWINS),
        m("weight of the descent", TWIN, 'self.rectify * logs["rectify"]', 'self.twin * logs["rectify"]', TWINS),
    ),
    "BOOT": (
        m("target at t", BOOT, "path.coefficients(s)", "path.coefficients(t)", BOOTS),
        m("sign of the target", BOOT, "(x - target) / w", "(x + target) / w", BOOTS),
        m("sign of lambda", BOOT, "path.ratio(s) / path.ratio(t)", "path.ratio(t) / path.ratio(s)", BOOTS),
        m("student told t", BOOT, "return self.signal(s, T,", "return self.signal(self.times(nets, draw)[0], T,",
          BOOTS),
        m("w left out", BOOT, "(x - target) / w", "(x - target) / 1", BOOTS),
        m("noise left in", BOOT, "(x_s - expand(sigma, z) * z)", "(x_s - 0 * z)", BOOTS),
        m("no boundary", BOOT, "self.boundary * logs", "0 * logs", BOOTS),
        m("boundary at the end", BOOT, "y, z = self.signal(T, T,", "y, z = self.signal(0 * T, T,", BOOTS),
        m("teacher not guided", BOOT, "Guided(nets.teacher, self.guidance)", "Guided(nets.teacher, 1.0)", BOOTS),
        m("target with gradient", BOOT, "with torch.no_grad():\n            y,",
          "with torch.enable_grad():\n            y,",
          BOOTS),
        m("two steps of the grid", BOOT, "(t - T / self.N)", "(t - 2 * T / self.N)", BOOTS),
    ),
    "SIGN": (
        m("idempotence of the student", SIGN, "replace(nets.student, denoiser=nets.target)", "nets.student", SIGNS),
        m("sign of the terms", SIGN, "loss = loss + getattr", "loss = loss - getattr", SIGNS),
        m("no gradient through the copy", SIGN, 'generate(x, batch.get("c"), steps=1) - x',
          'generate(x.detach(), batch.get("c"), steps=1) - x', SIGNS),
        m("the copy lags", SIGN, "denoiser.net, 0.0)", "denoiser.net, 0.5)", SIGNS),
        m("flow's target at t", SIGN, "self.projected(x_s, s, nets, c)", "self.projected(x_s, t, nets, c)", SIGNS),
        m("flow's target with gradient", SIGN, "with torch.no_grad()", "with torch.enable_grad()", SIGNS),
        m("inputs not scaled", SIGN, "x_t / expand(torch.hypot(alpha, sigma), x_t)", "x_t", SIGNS),
        m("rec of samples", SIGN, 'nets.student.generate(y, c, steps=1) - y',
          "nets.student.generate(y, c, steps=1) - x",
          SIGNS),
    ),
    "PCM, TCD": (
        m("phase of t", "distill/times", "((i.floor() + 1) * phases / N)",
          "((i.floor() + 2) * phases / N)", f"{OF}pcm.py"),
        m("not the student's times", PCM, "return pieces(i, self.N, nets.student.times, nets.teacher.path)",
          "return i / self.N", f"{OF}pcm.py"),
        m("sign of the hinge", PCM, "F.relu(1 - one)", "F.relu(1 + one)", f"{OF}pcm.py"),
        m("no hinge", PCM, "F.relu(1 - one)", "(-one)", f"{OF}pcm.py"),
        m("lambda forgotten", PCM, "loss + self.gan * logs", "loss + logs", f"{OF}pcm.py"),
        m("a mean over all pixels", PCM, "torch.stack([F.relu(1 - one).mean() for one in logits]).mean()",
          "F.relu(1 - torch.cat([*logits], 1)).mean()", f"{OF}pcm.py"),
        m("noised from data, not from e", PCM, "path.transition(x, e, u, draw.normal(f\"gan_eps{i}\", x.shape).to(x))",
          "path.diffuse(x, draw.normal(f\"gan_eps{i}\", x.shape).to(x), u)", f"{OF}pcm.py"),
        m("noised beyond the phase", PCM, "* (end - start)", "* (self.N - start)", f"{OF}pcm.py"),
        m("heads move the student", PCM, "with torch.no_grad():\n            out",
          "with torch.enable_grad():\n            out", f"{OF}pcm.py"),
        m("target for fake", PCM, "hinge_discriminator(*pair)", "hinge_discriminator(*pair[::-1])", f"{OF}pcm.py"),
        m("fresh noise between phases", "distill/student", 'student.renoise == "fresh"):', "False):", f"{OF}pcm.py"),
        m("x0 for x_e", LCD, "denoiser.path.diffuse(pred.x0, pred.eps, e)", "pred.x0", f"{OF}pcm.py", f"{OF}tcd.py"),
        m("sign of the noise", LCD, "diffuse(pred.x0, pred.eps, e)", "diffuse(pred.x0, -pred.eps, e)",
          f"{OF}pcm.py", f"{OF}tcd.py"),
        m("target with gradient", LCD, "            target = self.f(nets.target or student, x_s, s, e, also)\n",
          "        target = self.f(nets.target or student, x_s, s, e, also)\n", f"{OF}tcd.py"),
        m("target to the end of another", LCD, "student, x_s, s, e, also", "student, x_s, s, None, also",
          f"{OF}pcm.py", f"{OF}tcd.py"),
        m("never to s itself", TCD, "* i).floor() + 1", "* i).floor().clamp(min=1)", f"{OF}tcd.py"),
        m("up to t", TCD, "(self.reach * i)", "(self.reach * (i + 1))", f"{OF}tcd.py"),
    ),
    "sLCT": (
        m("noise not coupled", SLCT, "coupled(x, eps, c) if self.coupled else eps", "eps", f"{OF}slct.py"),
        m("coupled across conditions", SLCT, "kind[:, None] != kind", "kind[:, None] < kind[:, None]", f"{OF}slct.py"),
        m("coupled for the worst", SLCT, "cost.cpu()", "-cost.cpu()", f"{OF}slct.py"),
        m("coupled the other way", SLCT, ".numpy())[1]", ".numpy())[1].argsort()", f"{OF}slct.py"),
        m("sign of the denoising", SLCT, "return self.diffusion * low", "return -self.diffusion * low", f"{OF}slct.py"),
        m("denoising of the target", CT, "self.more(out - x", "self.more(target - x", f"{OF}slct.py"),
        m("c does not fall", SLCT, "math.exp(-1.18 * math.log(N) - 0.72)", "math.exp(-0.72)", f"{OF}slct.py"),
        m("denoising at the high levels", SLCT, "<= self.early", ">= self.early", f"{OF}slct.py"),
        m("2 c for 2 c^2", "distill/losses", "/ (2 * c**2))", "/ (2 * c))", f"{OF}ct.py"),
    ),
    "rCM": (
        m("sign of DMD", RCM, "loss + 2 * self.dmd * dmd", "loss - 2 * self.dmd * dmd", f"{OF}rcm.py"),
        m("sCM on the student's samples", RCM, 'batch["real"].to(x), nets', "x, nets", f"{OF}rcm.py"),
        m("DMD's samples without gradient", RCM, "self.matching.student_loss(x, nets",
          "self.matching.student_loss(x.detach(), nets", f"{OF}rcm.py"),
        m("DMD before its start", RCM, "if self.dmd and draw.step >= self.warmup", "if self.dmd", f"{OF}rcm.py"),
        m("DMD without weight", RCM, "+ 2 * self.dmd * dmd", "+ dmd", f"{OF}rcm.py"),
        m("DMD's teacher not guided", RCM, "DMD2(self.guidance, ", "DMD2(1.0, ", f"{OF}rcm.py"),
        m("mean for sum", RCM, ", reduction=self.reduction)", ")", f"{OF}rcm.py"),
        m("warm-up of sCM", RCM, "- r * x - slope", "- r * (x + slope)", f"{OF}rcm.py"),
        m("the fake's x0 unweighted", RCM, "expand(a, x) for a in path.coef", "expand(a, x) / 2 for a in path.coef",
          f"{OF}rcm.py"),
        m("DMD with a half", RCM, "+ 2 * self.dmd * dmd", "+ self.dmd * dmd", f"{OF}rcm.py"),
        m("the student waits for nobody", RCM, ", alone=self.warmup", "", f"{OF}rcm.py"),
        m("fake from the first step", RCM, "start=self.warmup", "start=0", f"{OF}rcm.py"),
    ),
    "ECT, iCT": (
        m("other noise at r", CT, "path.diffuse(x, eps, r), r, c)", "path.diffuse(x, eps.roll(1, 0), r), r, c)",
          f"{OF}ct.py"),
        m("target with gradient", CT, "with torch.no_grad():\n            target",
          "with torch.enable_grad():\n            target",
          f"{OF}ct.py"),
        m("target at t", CT, "path.diffuse(x, eps, r), r, c)", "path.diffuse(x, eps, t), t, c)", f"{OF}ct.py"),
        m("no boundary", CT, "expand(r, x) > 0,", "expand(r, x) >= 0,", f"{OF}ct.py"),
        m("not weighted", CT, "gap.to(x) if self.weighted", "1.0 if self.weighted", f"{OF}ct.py"),
        m("c_out, not its square", CT, "(s * sigma_d) ** 2 /", "(s * sigma_d) /", f"{OF}ct.py"),
        m("elements for the vector", "distill/losses", "linalg.vector_norm(delta.flatten(1), dim=1)",
          "linalg.vector_norm(delta.flatten(1), dim=1) / delta[0].numel() ** 0.5", f"{OF}ct.py"),
        m("sign of n", CURRICULUM, "torch.sigmoid(-self.b * s)", "torch.sigmoid(self.b * s)", f"{OF}ct.py"),
        m("a stage late", CURRICULUM, "step // self.every + 1", "step // self.every + 2", f"{OF}ct.py"),
        m("grid not doubled", CURRICULUM, "self.n_0 << min(step", "self.n_0 + min(step", f"{OF}ct.py"),
        m("sign of the mean", CURRICULUM, "s.log() - self.mean", "s.log() + self.mean", f"{OF}ct.py"),
    ),
    "sCM": (
        m("sign of the derivative", SCM, "self.sigma_d * dF,", "-self.sigma_d * dF,", CONTINUOUS),
        m("sign of the second term", SCM, "- r * (x + slope)", "+ r * (x + slope)", CONTINUOUS),
        m("prior the wrong way", WEIGHT, "m / expand(s, m) if", "m * expand(s, m) if", WEIGHED),
        m("weight upside down", WEIGHT, "(-l).exp()", "l.exp()", WEIGHED),
        m("weight without its price", WEIGHT, "+ l.mean(), {", "+ 0 * l.mean(), {", WEIGHED),
        m("weight moved by the fake score", "distill/roles", '"weight": "student"', '"weight": "fake"', TRAINER),
        m("sign of the tangent", SCM, "- sgF - tangent", "- sgF + tangent", BY_HAND),
        m("target with gradient", SCM, "- sgF - tangent) ** 2", "- out - tangent) ** 2",
          "tests/test_ledger.py::TestOnePass"),
        m("time in quarter turns", SCM, "* (2 / math.pi))", ")", CONTINUOUS),
        m("x_t held still", SCM, "(cos * sin * dx, (", "(0 * dx, (", CONTINUOUS),
        m("sigma_d forgotten", SCM, "(self.sigma_d * sgF - dx,", "(sgF - dx,", CONTINUOUS),
        m("velocity of the student", SCM, "Guided(teacher, w)(x_t, t, c)", "Guided(student, w)(x_t, t, c)",
          CONTINUOUS),
        m("not normalised", SCM, "g / (size + self.c)", "g", f"{CONTRACTS}::TestTargets"),
        m("norm of the whole vector", SCM, "x[0].numel() ** 0.5", "1.0", f"{CONTRACTS}::TestTargets"),
        m("no warm-up", SCM, "min(1.0, draw.step / self.warmup) if self.warmup else 1.0", "1.0",
          f"{CONTRACTS}::TestTargets"),
        m("sign of the velocity", SCM, "* pred.eps - expand", "* pred.eps + expand", CONTINUOUS),
    ),
    "DMD": (
        m("sign of the regression", DMD, "loss + self.regression *", "loss - self.regression *", f"{OF}dmd.py"),
        m("gradient through the scores", DMD2, *PREDICTED, f"{OF}dmd.py::test_gradient", more=(KEEP_G,)),
        m("regression left out", DMD, "if self.regression:\n            logs", "if False:\n            logs",
          f"{OF}dmd.py"),
        m("regression on the samples of g", DMD, "self.paired.sample(nets, batch, draw), nets", "x, nets",
          f"{OF}dmd.py"),
        m("mean for sum", DMD, "self.huber_c, self.reduction)", 'self.huber_c, "mean")', f"{OF}dmd.py"),
        m("teacher not guided", DMD, "DMD2(self.guidance, 1", "DMD2(1.0, 1", f"{OF}dmd.py::TestWithoutRegression"),
        m("fake on fresh samples", DMD, "self.matching.fake_loss, reuse=True", "self.matching.fake_loss",
          f"{OF}dmd.py::TestWithoutRegression"),
    ),
    "Diff-Instruct": (
        m("sign of g", DI, "reduce(push(x, g)", "reduce(push(x, -g)", f"{OF}diff_instruct.py"),
        m("weight by sigma / alpha", DI, "path.ratio(t) ** 2", "path.ratio(t)", f"{OF}diff_instruct.py"),
        m("weight the wrong way", DI, "gap / expand(", "gap * expand(", f"{OF}diff_instruct.py"),
        m("mean for sum", DI, 'push(x, g), self.reduction)', 'push(x, g), "mean")', f"{OF}diff_instruct.py"),
        m("gradient through the scores", DI, NO_GRAD, GRAD, f"{OF}diff_instruct.py", more=(KEEP_G,)),
        m("student before the fake", DI,
          'Update("fake", self.fake_loss), Update("student", self.student_loss, self.fake_steps)',
          'Update("student", self.student_loss, self.fake_steps), Update("fake", self.fake_loss)',
          f"{OF}diff_instruct.py"),
        m("fake on the wrong level", DI, "nets.fake(path.diffuse(x, eps, t), t, c), x",
          "nets.fake(path.diffuse(x, eps, t), 1 - t, c), x", f"{OF}diff_instruct.py"),
    ),
    "f-distill": (
        m("ratio upside down", F_DISTILL, "logit.exp()", "(-logit).exp()", f"{OF}f_distill.py"),
        m("gradient through scores and ratio", DMD2, *PREDICTED, f"{OF}f_distill.py", more=(KEEP_G,)),
        m("no h", F_DISTILL, "fake.x0, expand(h, x_t), logs", "fake.x0, 1.0, logs", f"{OF}f_distill.py"),
        m("js for softened-kl", F_DISTILL, "2 * r / (1 + r)", "2 / (1 + r)", f"{OF}f_distill.py"),
        m("r not bounded", F_DISTILL, ".clamp(self.low, self.high)", "", f"{OF}f_distill.py"),
        m("hellinger without its root", F_DISTILL, "torch.sqrt,", "lambda r: r,", f"{OF}f_distill.py"),
        m("sum of the heads", F_DISTILL, ".flatten(1).mean(1).double()", ".flatten(1).sum(1).double()",
          f"{OF}f_distill.py"),
        m("one bin of t", F_DISTILL, "(total / count.clamp(min=1))", "(0 * total + total.sum() / count.sum())",
          f"{OF}f_distill.py"),
        m("ratio multiplied", F_DISTILL, "](r / self.mean_ratio", "](r * self.mean_ratio", f"{OF}f_distill.py"),
        m("heads of the fake alone", DISC, "getattr(nets, self.gan_features)", "nets.fake", f"{OF}f_distill.py"),
        m("noise of its own", DMD2, "(x_t, t) if self.at_score_noise else None", "None", f"{OF}f_distill.py"),
        m("weight of the loss, not of g", DMD2, "g = h * (fake - real)", "g = (fake - real)", f"{OF}f_distill.py"),
    ),
    "SANA-Sprint": (
        m("the GAN forgotten", SPRINT, "return loss + self.gan * gan", "return loss + 0 * gan", RUN_UP),
        m("the GAN's samples without gradient", SPRINT, "self.ladd.student_loss(x, nets",
          "self.ladd.student_loss(x.detach(), nets", RUN_UP),
        m("sign of the GAN", SPRINT, "return loss + self.gan * gan", "return loss - self.gan * gan", RUN_UP),
        m("sCM at weight 0 of a generated sample", SPRINT,
          "        if not self.gan:\n            return super().sample",
          "        if False:\n            return super().sample", RUN_UP),
        m("sCM on the student's samples", SPRINT,
          'student_loss(batch["real"].to(x), nets', "student_loss(x, nets", RUN_UP),
        m("the last time never", SPRINT, "(B,)) < self.last", "(B,)) < 0", RUN_UP),
        m("the last time's share turned round", SPRINT, "(B,)) < self.last", "(B,)) >= self.last", RUN_UP),
        m("the real sample shines through at the end", SPRINT,
          "torch.where(expand(last, y).bool(), student.input_scale * z,",
          "torch.where(expand(0 * last, y).bool(), student.input_scale * z,", RUN_UP),
        m("half latents' levels", SPRINT, "LogNormal(0.2 + math.log(2), 1.6)", "LogNormal(0.2, 1.6)", RUN_UP),
        m("guidance not told", SPRINT, 'told(batch["c"], w)', 'batch["c"]', RUN_UP),
        m("another level of noise", SPRINT, "path.diffuse(y, z, s)", "path.diffuse(y, z, s / 2)", RUN_UP),
        m("SANA's embedding moves at first", "pipelines/sana", "torch.nn.init.zeros_(p)", "pass",
          "tests/test_sana.py::test_the_embedding_moves_nothing_at_first"),
        m("SANA's guidance not scaled", "pipelines/sana", "w * net.config.guidance_embeds_scale", "w",
          "tests/test_sana.py::test_sana_sprints_pipeline_gives_what_the_student_gives"),
        m("SANA's second angle", "pipelines/sana", "(math.pi / 2, 1.3)", "(math.pi / 2, 1.1)",
          "tests/test_sana.py::test_times"),
        m("flow's input not rescaled", "distill/denoiser", "return scale * x, t, scale", "return x, t, scale", RUN_UP),
    ),
    "LADD": (
        m("sign of the student", "distill/losses", "return -fake.mean()", "return fake.mean()", f"{OF}ladd.py"),
        m("reals called fakes", LADD, "fake, real = nets.disc", "real, fake = nets.disc", f"{OF}ladd.py"),
        m("no margin", "distill/losses", "F.relu(1 + fake).mean() + F.relu(1 - real)",
          "(1 + fake).mean() + (1 - real)", f"{OF}ladd.py"),
        m("the student's without gradient", LADD, "self.gan_times, x, batch", "self.gan_times, x.detach(), batch",
          f"{OF}ladd.py"),
        m("on the clean sample", DISC, "path.diffuse(x, eps, u), u, c", "x, u, c", f"{OF}ladd.py"),
        m("features of the student", LADD, "seen(nets.teacher, self.taps, self.gan_times, both",
          "seen(nets.student.denoiser, self.taps, self.gan_times, both", f"{OF}ladd.py"),
        m("always the first call", LADD, "dtype=torch.float64, device=u.device)[call]",
          "dtype=torch.float64, device=u.device)[0 * call]", f"{OF}ladd.py"),
        m("samples under prompts of their own", LADD, 'batch["c"] = batch["real_c"]', 'batch["c"] = batch["c"]',
          f"{OF}ladd.py"),
        m("one logit for all places", DISC, "return logits.flatten(1) if self.places else logits.mean(1)",
          "return logits.mean(1)", LOSSES),
        m("the first tap alone", DISC, "head(feature, places) for feature in features]",
          "head(feature, places) for feature in features[:1]]", ROLES, LOSSES),
    ),
    "Denoise": (
        m("sign of the target", "distill/losses", "pred.out - pred.target(x0, eps) if",
          "pred.out + pred.target(x0, eps) if", f"{OF}denoise.py"),
        m("told another level", DENOISE, "eps, t), t, c), x", "eps, t), 1 - t, c), x", f"{OF}denoise.py"),
        m("of the clean image", DENOISE, "denoiser.path.diffuse(x, eps, t)", "x", f"{OF}denoise.py"),
        m("target of other noise", DENOISE, "c), x, eps, self", "c), x, eps.roll(1, 0), self", f"{OF}denoise.py"),
        m("drops the others", DENOISE, "< self.p_drop)", ">= self.p_drop)", f"{OF}denoise.py"),
    ),
    "schedules, kinds": (
        m("v to x0", "distill/schedule", "return (a * x - s * out) / (a**2", "return (a * x + s * out) / (a**2",
          SCHEDULE),
        m("flow to eps", "distill/schedule", "(x + a * out) / (a + s)", "(x - a * out) / (a + s)", SCHEDULE),
        m("target of flow", "distill/schedule", "return eps - x0\n            case",
          "return x0 - eps\n            case", SCHEDULE),
        m("c_skip of EDM", "distill/schedule", "a * self.sigma_d**2 / norm**2 * x", "self.sigma_d / norm * x",
          SCHEDULE),
        m("score without sigma", "distill/schedule", "-self.eps / self.sigma\n\n    def target",
          "-self.eps\n\n    def target", DENOISER, SCHEDULE),
        m("renoising to the wrong variance", "distill/schedule", "(s_t**2 - (a * s_s) ** 2)", "(s_t**2 - s_s**2)",
          SCHEDULE),
        m("sigma_d of TrigFlow", "distill/schedule", "return theta.cos(), self.sigma_d * theta.sin()",
          "return theta.cos(), theta.sin()", SCHEDULE),
        m("VP off by one", "distill/schedule", "t.double() * (len(self.alphas_cumprod) - 1)",
          "t.double() * len(self.alphas_cumprod)", SCHEDULE),
        m("rho of EDM", "distill/schedule", "(low + t.double() * (high - low)) ** self.rho",
          "(low + t.double() * (high - low)) ** 6", SCHEDULE),
        m("frames by signal", "distill/denoiser", "expand(torch.hypot(a, s) / torch.hypot(a_f, s_f), x)",
          "expand(a_f / a, x)", DENOISER),
        m("second sample for the second stream", "distill/denoiser",
          "feature(output) if isinstance(output, tuple) else output", "feature(output)", DENOISER),
        m("score of the frame", "distill/denoiser", "-self.eps / self.sigma * self.scale", "-self.eps / self.sigma",
          DENOISER),
        m("Grid without its last", "distill/times", "(self.high - self.low + 1)", "(self.high - self.low)", DRAW),
        m("LogNormal in base 10", "distill/times", "draw.normal(name, (B,)).double()).exp())",
          "draw.normal(name, (B,)).double()).mul(2.302585).exp())", DRAW),
    ),
    "Staged": (
        m("the cleanest first", "distill/times", "lambda u: low + (1 - low) * u", "lambda u: (1 - low) * u", STAGED),
        m("one cluster at a time", "distill/times", "low + (1 - low) * u", "low + u / self.N", STAGED),
        m("a stage late", "distill/times", "draw.step // self.every + 1", "draw.step // self.every", STAGED),
        m("the last cluster never", "distill/times", "if n < self.N:", "if (n := min(n, self.N - 1)):", STAGED),
        m("normal numbers not moved", "distill/times", "torch.special.ndtri(self.f(torch.special.ndtr(",
          "torch.special.ndtri((torch.special.ndtr(", STAGED),
        m("means for medians", "distill/times", "total[(i + j) // 2] - total[(i + j + 1) // 2]",
          "total[(i + j) // 3] - total[(i + j + 1) // 3]", STAGED),
    ),
    "regression": (
        m("sign of the target", ODE, "delta = x - y", "delta = x + y", OPTIMUM),
        m("onto the noise", ODE, 'batch["y"].to(x)', 'batch["z"].to(x)', OPTIMUM),
        m("samples without gradient", ODE, "delta = x - y", "delta = x.detach() - y", OPTIMUM),
        m("mean for sum", ODE, "self.huber_c), self.reduction)", 'self.huber_c), "mean")', OPTIMUM),
        m("fresh noise", ODE, 'nets.student.generate(batch["z"], batch.get("c"), draw)', "nets.generate(batch, draw)",
          f"{OPTIMUM}::test_it_learns_the_teachers_trajectories"),
        m("latents for images", LOOKS, "found = decode(x.float())", "found = x.float()", OPTIMUM),
        m("LPIPS without gradient", LOOKS, "net(images(x), target)", "net(images(x.detach()), target)", OPTIMUM),
        m("LPIPS in half precision", LOOKS, "enabled=False", "enabled=True", OPTIMUM),
        m("noise of another seed", PAIR, "noise(self.seed, rows, stored", "noise(0, rows, stored", PAIRS),
        m("prompt of another pair", PAIR, 'self.text.read(stored["caption"].tolist())',
          "self.text.read([(row + 1) % 8 for row in rows])", PAIRS),
        m("samples without guidance", PAIR, "c, self.steps, self.guidance)", "c, self.steps)", PAIRS),
        m("Euler's leading times", "pipelines/pairs", '="trailing"', '="leading"', PAIRS),
    ),
    "guidance": (
        m("w + 1", "distill/guidance", "empty + w * (cond - empty)", "cond + w * (cond - empty)", DENOISER),
        m("branches exchanged", "distill/guidance", "cond, empty = pred", "empty, cond = pred", DENOISER),
        m("drops the wrong ones", "distill/guidance", "empty[k], v) for", "v, empty[k]) for", DENOISER),
        m("range from 0", "distill/guidance", "w[0] + (w[1] - w[0]) * draw", "w[1] * draw", DENOISER),
        m("w = 0 is conditional", "distill/guidance", "self.base(x, t, null_of(self.base.null, c))",
          "self.base(x, t, c)", DENOISER),
    ),
    "student, solvers": (
        m("gradient through all calls", "distill/student", "with torch.no_grad():", "with torch.enable_grad():",
          STUDENT),
        m("renoised to the old level", "distill/student", "(*self.times, 0.0)[i + 1]",
          "(*self.times, 0.0)[i]", STUDENT),
        m("calls at the first time", "distill/student", "self._time(self.times[i], x)", "self._time(self.times[0], x)",
          STUDENT),
        m("scaled by the signal", "distill/student", "dtype=torch.float64))[1])", "dtype=torch.float64))[0])",
          STUDENT),
        m("the same noise again", "distill/student", 'f"renoise{i}", tuple(x', '"renoise0", tuple(x', STUDENT),
        m("DDIM without its noise", "distill/solver", "diffuse(pred.x0, pred.eps, s)",
          "diffuse(pred.x0, 0 * pred.eps, s)", STUDENT),
        m("Heun's second slope at t", "distill/solver", "denoiser(euler, s, c).eps", "denoiser(euler, t, c).eps",
          STUDENT),
    ),
    "losses, draws": (
        m("push by half", "distill/losses", "g * (x - x.detach())", "0.5 * g * (x - x.detach())", LOSSES),
        m("sum over the batch", "distill/losses", "elements.sum() / len(elements)", "elements.sum()", LOSSES),
        m("normaliser with gradient", "distill/losses", ".clamp(min=low).detach()", ".clamp(min=low)", LOSSES),
        m("normaliser of the batch", "distill/losses", "per_sample((x - real).abs())", "(x - real).abs().mean()",
          LOSSES),
        m("denoising in x0", "distill/losses", 'if space == "network" else', 'if space == "x0" else', LOSSES),
        m("GAN of the student saturates", "distill/losses", "F.softplus(-fake).mean()\n\n",
          "-F.softplus(fake).mean()\n\n", LOSSES),
        m("reals called fakes", "distill/losses", "F.softplus(fake).mean() + F.softplus(-real)",
          "F.softplus(-fake).mean() + F.softplus(real)", LOSSES),
        m("players draw alike", "distill/draw", "_hash(self.seed, self.step, self.player, name)",
          "_hash(self.seed, self.step, name)", DRAW),
        m("steps draw alike", "distill/draw", "_hash(self.seed, self.step, self.player, name)",
          "_hash(self.seed, self.player, name)", DRAW),
        m("samples by their place", "distill/draw", "self.samples.to(torch.int32)[:, None]",
          "torch.arange(len(self.samples), dtype=torch.int32)[:, None]", DRAW),
        m("players choose differently", "distill/draw", "_hash(self.seed, self.step, name)[0] % n",
          "_hash(self.seed, self.step, self.player, name)[0] % n", DRAW),
    ),
    "loop": (
        m("accumulation sums", "distill/trainer", "(loss / cfg.gradient_accumulation_steps).backward(one)",
          "loss.backward(one)", f"{TRAINER}::test_accumulation"),
        m("gradients are kept", "distill/trainer", "            optimizer.zero_grad(set_to_none=True)\n", "",
          f"{TRAINER}::test_only_the_player_moves"),
        m("everybody gets gradients", "distill/trainer", "            own(players, player)\n", "",
          f"{TRAINER}::test_only_the_player_moves"),
        m("reuse with its graph", "distill/trainer",
          "done.append(health.Turn(x.detach(), batch", "done.append(health.Turn(x, batch",
          f"{TRAINER}::test_samples_are_reused"),
        m("reuse of the first batch", "distill/trainer",
          "(x, batch, *_), source = kept[i]", "(x, batch, *_), source = kept[0]",
          f"{TRAINER}::test_samples_are_reused"),
        m("NaN goes on", "distill/trainer", "if not torch.isfinite(norm):", "if False:",
          f"{TRAINER}::test_a_nan_stops_by_name"),
        m("step before the check", "distill/trainer", "            if not torch.isfinite(norm):\n",
          "            optimizer.step()\n            if not torch.isfinite(norm):\n",
          f"{TRAINER}::test_a_nan_stops_by_name"),
        m("one learning rate for both", "distill/trainer", "rates[player] * cfg.rate(step)",
          'rates["student"] * cfg.rate(step)', f"{TRAINER}::test_learning_rates"),
        m("warm-up from 0", "distill/trainer", "(step + 1) / (self.lr_warmup_steps + 1)",
          "step / (self.lr_warmup_steps + 1)", f"{TRAINER}::test_learning_rates"),
        m("average of the fake's turns too", "distill/trainer", 'if player == "student":\n', "if True:\n",
          f"{TRAINER}::test_average"),
        m("average never moves", "distill/trainer", "state.ema.update(nets.student.denoiser.net, cfg.",
          "print(cfg.", f"{TRAINER}::test_average"),
        m("power average of the loop's steps", "distill/trainer", 'count_updates(method, "student", step)', "step",
          f"{TRAINER}::test_power_average"),
        m("the student's limit for the fake score", "distill/trainer", "clip(players[player], cfg.norm(player))",
          "clip(players[player], cfg.max_grad_norm)", f"{TRAINER}::test_each_player_has_its_norm"),
        m("average forgets the wrong way", "distill/ema", "self.theirs, 1 - beta)", "self.theirs, beta)", EMA),
        m("ramp as a floor", "distill/ema", "min(self.half_life, self.ramp * seen)",
          "max(self.half_life, self.ramp * seen)", EMA),
        m("Adam starts anew on resuming", "distill/checkpoint", "    optimizer.load_state_dict(", "    dict(",
          f"{TRAINER}::test_resume_equals_the_uninterrupted_run"),
        m("average not restored", "distill/checkpoint",
          "for key, t in _named(state.ema.net).items() if key in student}",
          "for key, t in _named(state.nets.student.denoiser.net).items() if key in student}",
          f"{TRAINER}::test_resume_equals_the_uninterrupted_run"),
        m("step not restored", "distill/checkpoint", "state.skipped = facts[\"step\"],", "state.skipped = 0,",
          f"{TRAINER}::test_resume_equals_the_uninterrupted_run"),
        m("fake is the student", "distill/roles", "nets.fake = replace(teacher, net=fake.lora(teacher.net))",
          "nets.fake = nets.student.denoiser", ROLES, TRAINER),
        m("student is the teacher", "distill/lora", "copy.deepcopy(net).requires_grad_(True)",
          "net.requires_grad_(True)", ROLES),
    ),
    "memory": (
        m("masters in half precision", "distill/lora", "if p.requires_grad and p.dtype.itemsize < 4:", "if False:",
          f"{MEMORY}::test_what_trains_from_a_half_precision_teacher_is_float32"),
        m("casts outlive their call", "distill/memory", "AutocastKwargs(cache_enabled=False)", "AutocastKwargs()",
          f"{MEMORY}::test_no_cast_outlives_a_call"),
        m("target with a backbone of its own", "distill/roles", "twin(nets.student.denoiser.net)",
          "nets.student.denoiser.copy().net", f"{MEMORY}::test_a_target_shares_the_backbone"),
        m("the teacher is not recomputed", "distill/memory", "{**_denoisers(nets), **nets.frozen()}.items()",
          "nets.modules().items()", f"{MEMORY}::test_gradient_checkpointing"),
        m("a backend is believed", "distill/memory", "if not gap <= TOLERANCE:", "if False:",
          f"{MEMORY}::test_a_broken_backend_is_found_before_training"),
        m("second stage from the last weights", "distill/checkpoint", 'name = "ema" if role',
          'name = "student" if role', f"{ROLES}::test_a_second_stage_starts_where_the_first_ended"),
        m("timesteps from 1 to N", "distill/roles", "self.timestep / last", "self.timestep / (last + 1)",
          f"{ROLES}::test_first_call_is_named_by_its_timestep"),
    ),
    "evaluation": (
        m("a reference unchecked", "eval/score", '.check(f"{path}")', "", f"{METRICS}::{STATISTICS}"),
        m("an asymmetric covariance", "eval/metrics", "if off > ROUNDING * cov.abs().max():", "if False:",
          f"{METRICS}::{STATISTICS}"),
        m("an indefinite covariance", "eval/metrics", "if values[0] < -ROUNDING * values[-1]:", "if False:",
          f"{METRICS}::{STATISTICS}"),
        m("an infinite distance", "eval/metrics", "if not math.isfinite(value):", "if False:",
          f"{METRICS}::{STATISTICS}"),
        m("too few images are seen late", "eval/score", "if len(found.files) < least:", "if False:",
          f"{METRICS}::test_a_metric_or_a_folder_that_fails_takes_no_other_with_it"),
        m("a torn chunk is trusted", "eval/features", "ValueError):\n        return False",
          "ValueError):\n        return True", "tests/test_features.py::test_the_cache_answers_and_tells_apart"),
        m("values unescaped on the page", "eval/markup", "Markup(literal).format(*values, **named)",
          "Markup(literal.format(*values, **named))", f"{PAGE}::test_markup_in_every_field_stays_text"),
        m("values unescaped in Markdown", "pipelines/markdown", "return html.escape(marked, quote=False)",
          "return marked", f"{PAGE}::test_markup_in_every_field_stays_text"),
        m("half a file stays", "eval/files", "            part.unlink(missing_ok=True)\n", "            pass\n",
          "tests/test_disk.py::test_features_scores_and_the_page"),
        m("a run is called pipeline", "eval/generate", "        parts.pop()\n    name = ", "        break\n    name = ",
          "tests/test_generate.py::test_a_model_is_named_by_its_run"),
    ),  # fmt: skip
    "export": (
        m("level of the scheduler", "pipelines/edm", "sigma_min=0.0, sigma_max=sigma",
          "sigma_min=0.002, sigma_max=80.0", EXPORTED),
        m("no rehearsal", "pipelines/run", "rehearse(nets.student, teacher, scheduler, card)", "pass",
          f"{RECIPES}::test_a_recipe_fails_before_its_first_step"),
        m("a rehearsal passes", "pipelines/rehearsal", "if not gap <= TOLERANCE:", "if False:",
          f"{REHEARSAL}::test_what_a_rehearsal_catches"),
        m("no zero terminal SNR", "pipelines/noise", '"rescale_betas_zero_snr": True}', '"steps_offset": 1}',
          f"{REHEARSAL}::test_a_student_has_the_teachers_table"),
        m("rslora", "pipelines/adapter_config", "* math.sqrt(r) if", "if",
          "tests/test_published.py::test_alpha_of_peft"),
        m("wrong export passes", "pipelines/export", "if not gap.largest <= TOLERANCE}", "if False}",
          f"{RECIPES}::test_a_recipe_fails_with_its_export"),
        m("the raw weights", "pipelines/run", "nets.student, state.ema.net\n",
          "nets.student, nets.student.denoiser.net\n", EXPORTED),
        m("c_noise", "pipelines/edm", "self.c_noise * sigma.log()", "self.c_noise * sigma.log() / 2", EXPORTED),
        m("times of the exported scheduler", "pipelines/scheduler", "timesteps.double() / 250)",
          "timesteps.double() / 240)", f"{RECIPES}::test_two_steps_are_exported"),
    ),
}
# fmt: on


def copied(to):
    """The tree without caches, as a mutation finds it."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for room in ROOMS:
        shutil.copytree(ROOT / room, to / room, ignore=skip)
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, to / name)
    return to


def applied(mutation, tree=ROOT):
    """{file: text} after the mutation; every snippet must be there exactly once."""
    texts = {}
    for file, old, new in mutation.changes:
        text = texts.get(file) or (tree / file).read_text()
        if text.count(old) != 1:
            sys.exit(f"mutation {mutation.name!r}: found {text.count(old)} times, not once, in {file}:\n{old}")
        texts[file] = text.replace(old, new)
    return texts


class Watch:
    """The first failing test, and how many ran."""

    def __init__(self):
        self.failed, self.ran, self.broken = None, 0, None

    def pytest_runtest_logreport(self, report):
        self.ran += report.when == "call" and report.passed
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_collectreport(self, report):
        if report.failed:
            self.broken = report.nodeid or "collection"


def child(tree, tests, log, answer):
    """In a process of its own: the tests of `tree`; the answer goes through a pipe."""
    import pytest

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = f"{tree}"
    sys.path[:] = [
        f"{tree}",
        f"{tree / 'tests'}",
        *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests")),
    ]
    watch = Watch()
    pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[watch])
    import distill

    assert Path(distill.__path__[0]).resolve() == (tree / "distill").resolve(), "the tests did not look at the copy"
    answer.send((watch.failed, watch.ran, watch.broken))


def pytested(tree, tests, log, timeout=TIMEOUT):
    """(first failing test or None, tests that passed, a file that does not even import)."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(tree, tests, log, theirs))
    process.start()
    theirs.close()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        return None, 0, f"no end after {timeout} s"
    try:
        return ours.recv()
    except EOFError:
        return None, 0, "the process died"


def prepare():
    """Import what is slow, and say where the stored numbers are: the copy has no neighbours."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True  # a mistake of the same length and second would be served from the cache
    for name in SLOW.split():
        importlib.import_module(name)
    golden = Path(os.environ.get("DISTILL_GOLDEN") or ROOT.parent / "shared" / "golden")
    if golden.exists():
        os.environ["DISTILL_GOLDEN"] = f"{golden.resolve()}"


def main(words):
    chosen = {
        group: [mutation for mutation in mutations if not words or any(w in f"{group}: {mutation.name}" for w in words)]
        for group, mutations in MUTATIONS.items()
    }
    todo = [mutation for mutations in chosen.values() for mutation in mutations]
    for mutation in todo:
        applied(mutation)  # ends at once where a snippet is not found
    prepare()
    from rich.console import Console

    console, began, survived = Console(), time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        tree, log = copied(Path(folder) / "tree"), Path(folder) / "log.txt"
        failed, ran, broken = pytested(tree, sorted({test for m in todo for test in m.tests}), log, 4 * TIMEOUT)
        if failed or broken or not ran:
            sys.exit(f"these tests fail without any mistake: {failed or broken}\n{log.read_text()[-3000:]}")
        console.print(f"{ran} tests pass as it is; {len(todo)} mistakes on purpose:")
        for group, mutations in chosen.items():
            rows = [(mutation.name, *noticed(mutation, tree, log)) for mutation in mutations]
            survived += [f"{group}: {name}" for name, test, *_ in rows if test is None]
            if rows:
                console.print(table(group, rows))
    print(f"{len(todo) - len(survived)} of {len(todo)} noticed in {time.perf_counter() - began:.0f} s")
    if survived:
        sys.exit("not noticed: " + "; ".join(survived))


def noticed(mutation, tree, log):
    """(first failing test or None, why there is none, seconds); the tree is right again afterwards."""
    start, wrong = time.perf_counter(), applied(mutation, tree)
    right = {file: (tree / file).read_text() for file in wrong}
    write(tree, wrong)
    failed, _, broken = pytested(tree, mutation.tests, log)
    write(tree, right)
    return failed, broken or "nothing", time.perf_counter() - start


def table(group, rows):
    """mutation | caught by | seconds."""
    from rich.markup import escape
    from rich.table import Table

    found = Table(title=group, title_justify="left", expand=True)
    found.add_column("mutation", width=33)
    found.add_column("caught by", overflow="fold")
    found.add_column("s", justify="right", width=4)
    for name, test, why, seconds in rows:
        test = test and escape(re.sub(r"tests/(?:methods/)?test_(\w+)\.py::(\w+::)?test_", r"\1: ", test))
        found.add_row(name, test or f"[red]{why}[/]", f"{seconds:.1f}")
    return found


def write(tree, texts):
    for file, text in texts.items():
        (tree / file).write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
