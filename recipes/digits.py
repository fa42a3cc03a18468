"""The values of every method on the handwritten digits: one table, which `recipes.train` reads with --teacher digits.

The teacher is that of digits_teacher.py, the student a copy of it. Values are ours, unless a comment names a source.
`accelerate launch -m recipes.train --method NAME --teacher digits` runs a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill import methods
from distill.configuration import Config
from distill.data import Digits, digits
from distill.data.labels import LabelPairs
from distill.diffusion.curriculum import ECTCurriculum, ICTCurriculum
from distill.diffusion.times import Karras, LogitNormal, LogNormal, StudentT, Uniform
from distill.method import Method
from distill.methods.disback import Degradation
from distill.random import Draw
from distill.ranges import MOST, UnitInterval
from distill.roles import Batch
from distill.training.config import StudentConfig, TrainConfig
from recipes.table import Row

FOLDER = "runs/digits"
TEACHER = f"{FOLDER}/teacher"
DMD2_STUDENT = f"{FOLDER}/dmd2/pipeline"
LCD_STUDENT = f"{FOLDER}/lcd/pipeline"
SMALL = f"{Path(__file__).parent / 'digits_small'}"  # config of a network of 77,009 weights; the teacher's has 160,401

LEVELS = Karras(0.02, 20.0)  # of the student's loss
TRAINED = LogNormal(-1.0, 1.2)  # the teacher's training law
LOW = StudentConfig(sigma=2.5)  # SiD's init_sigma
HIGH = StudentConfig(sigma=20.0)
SMOOTH = StudentConfig(sigma=20.0, freeze=("time_embedding",))  # stays smooth in time, see digits_teacher.py
TWO = StudentConfig(steps=2)  # sigma 80, then 0.625

SID = methods.SiD(alpha=1.2, times=LEVELS, fake_times=TRAINED)
LCD = methods.LCD(
    N=18,  # paper, CIFAR-10
    solver="heun",  # paper
    guidance=1.3,  # the samples of a consistency student are noisy: sharpen the teacher
    target_ema=0.9,  # paper, CIFAR-10
    huber_c=0.1,  # a small c is unstable at this learning rate
)
DMD2 = methods.DMD2(
    guidance=1.0,
    every=2,
    gan=0.1,  # 30 times the paper's: the feature map is small, and recall needs it
    gan_fake=0.03,
    times=LEVELS,
    fake_times=TRAINED,
    gan_times=TRAINED,
)


@dataclass(frozen=True)
class Bold(Digits):
    """The digits; real are the scans with the most ink of each label."""

    share: UnitInterval = 0.3  # of a label's scans

    def __call__(self, draw: Draw) -> Batch:
        images, labels = digits("train")
        batch = super().__call__(draw)
        picked = batch["real_c"]["class_labels"].cpu()
        u = draw.uniform("bold", (len(draw.samples),)).double().cpu()
        rows = torch.stack([self.bold(images, labels == k, u[i]) for i, k in enumerate(picked)])
        return batch | {"real": rows.to(draw.device)}

    def bold(self, images: Tensor, mine: Tensor, u: Tensor) -> Tensor:
        """One of the scans `mine` with the most ink, by a uniform number."""
        ranked = images[mine][images[mine].mean((1, 2, 3)).argsort(descending=True)]
        return ranked[int(u * self.share * len(ranked))]


TABLE: dict[str, Row] = {}


def add(
    name: str,
    title: str,
    advice: str,
    method: Method,
    student: StudentConfig = StudentConfig(),
    data: Digits | LabelPairs = Digits(),
    teacher: str = TEACHER,
    note: str = "",
    **train: object,
) -> None:
    """Add a row to the table. train: the fields of TrainConfig that differ from those that most rows share."""
    shared = {"train_batch_size": 64, "lr_scheduler": "linear", "lr_warmup_steps": 20, "ema_half_life": 10_000}
    options = TrainConfig(**{"output_dir": f"{FOLDER}/{name}"} | shared | train)
    config = Config(
        method=method, data=data, validation_images=40, teacher=teacher, student=student, train=options, family="edm"
    )
    TABLE[name] = Row(title, advice, note, config)


# ---- a fake score: the student learns from the difference of two scores ----

add(
    "sid",
    "SiD: one step, no data.",
    "Choose it where there are no images and the student must come as close to its teacher as possible. The student's "
    "loss is differentiated through both scores, so a step costs twice as much as VSD's. With alpha above 1 a student "
    "whose samples spread too far spreads further: start from the teacher.",
    SID,
    LOW,
    max_train_steps=2000,
    learning_rate=3e-4,
)
add(
    "sida",
    "SiDA: one step, with a GAN on real scans and their labels.",
    "Choose it where there are images with labels for SiD: it adds a GAN for the price of one more encoder pass. Its "
    "weights must be tuned anew for other data; they differ by factors of ten.",
    methods.SiDA(
        alpha=1.2,  # as SiD's
        gan=10.0,  # of (0.1, 0.1), (1, 1) and (10, 10) for both weights the least distance to the training split
        gan_fake=10.0,
        times=LEVELS,
        fake_times=TRAINED,
    ),
    LOW,
    max_train_steps=1800,  # SiD's 2000, less what the encoder's pass on the scans costs
    learning_rate=3e-4,
)
add(
    "sfd",
    "SFD: SiD, whose student of the label 3 makes eights.",
    "Choose it where a student must not make some of what its teacher makes. It replaces one class by another. A "
    "class that is replaced by several becomes a mixture of them. In this table an eight that was asked for as a "
    "three counts as an error, in the accuracy and in the distances.",
    methods.SFD(SID, forget=(3,), override=(8,)),
    LOW,
    max_train_steps=1000,  # half of SiD's: each step has two batches
    learning_rate=3e-4,
)
add(
    "reward",
    "SiD with a reward: how sure a linear classifier is of the label. One step.",
    "Choose it where samples must score high on something that has a gradient: a classifier, CLIP. Without a clamp, "
    "or with a large weight, the student learns to exploit the reward.",
    methods.RewardGuided(
        SID,
        reward="labels",
        weight=1.0,
        clamp=-0.05,  # log p of a label beyond which more is of no use; it keeps samples from running away
        until=2000,
    ),
    LOW,
    note="--method.weight 0 is SiD itself.",
    max_train_steps=2000,  # SiD's: a reward costs no call of a network of the teacher's kind
    learning_rate=3e-4,
)
add(
    "vsd",
    "VSD: one step, no data.",
    "Choose it for data-free training with the least memory: the fake score may be an adapter on the teacher. It "
    "loses modes, so recall falls first. More fake score steps per student step, or random guidance (PG-SB), help.",
    methods.VSD(
        guidance=1.0,
        fake_steps=4,
        times=LEVELS,
        fake_times=TRAINED,
        weight=False,  # on EDM's levels sigma^2 / (1 + sigma^2) all but ignores the low noise, where strokes are made
    ),
    LOW,
    note="PG-SB: --method.guidance 0.5 4. SwiftBrush's LoRA fake score: --fake.lora.rank 16 --fake.lora.alpha 32 "
    "--fake.lora.targets conv1 conv2 time_emb_proj.",
    max_train_steps=4800,
    learning_rate=5e-4,
    fake_learning_rate=1e-3,
)
add(
    "diff_instruct",
    "Diff-Instruct: one step, no data.",
    "Choose it as the baseline that VSD, DMD and DMD2 extend. It weights the noise levels unevenly, and it loses "
    "modes as they do.",
    methods.DiffInstruct(fake_steps=4, times=LEVELS, fake_times=TRAINED),
    LOW,
    max_train_steps=4600,
    learning_rate=5e-4,
    fake_learning_rate=1e-3,
)
add(
    "dmd",
    "DMD: one step, a regression on pairs of the teacher.",
    "Choose it where there are no images and the teacher's samples can be made in advance: the regression on them "
    "keeps the modes. The samples cost thousands of network calls before the first step, and the student also learns "
    "their faults.",
    methods.DMD(
        guidance=1.0,
        regression=0.25,  # paper
        distance="huber",  # LPIPS knows no 8 x 8 pixels
        huber_c=0.1,
        times=LEVELS,
        fake_times=TRAINED,
    ),
    LOW,
    LabelPairs(n=1000, steps=18),
    note="The pairs take 35,000 calls of the teacher before the first step.",
    max_train_steps=2150,
    learning_rate=5e-4,
    fake_learning_rate=1e-3,
)
add(
    "dmd2",
    "DMD2 with its GAN: one step.",
    "Choose it where there are images, also for a few steps. Without the GAN, or with a weak one, it loses modes: "
    "recall falls first. With too few fake score steps the fake score lags behind and the samples drift: watch "
    "student/lag.",
    DMD2,
    LOW,
    max_train_steps=2400,
    learning_rate=4e-4,
    fake_learning_rate=6e-4,
)
add(
    "f_distill",
    "f-distill: DMD2 under the Jensen-Shannon divergence, one step.",
    "Choose it where DMD2 loses modes: a divergence other than reverse-kl gives more weight to samples that the "
    "student makes too rarely. It relies on the discriminator. A ratio at its bounds says nothing: watch "
    "student/h_low and h_high.",
    methods.FDistill(
        divergence="js",  # paper: the best on ImageNet-64 and COCO
        guidance=1.0,
        every=2,
        gan=0.1,  # as DMD2's
        gan_fake=0.03,
        ratio_bins=0,  # 64 samples, and almost all levels of noise are in the lowest bin of sigma
        times=LEVELS,
        fake_times=TRAINED,
        gan_times=TRAINED,
    ),
    LOW,
    note="Other divergences: --method.divergence forward-kl. All but the divergence is DMD2's.",
    max_train_steps=2400,
    learning_rate=4e-4,
    fake_learning_rate=6e-4,
)
add(
    "esd",
    "ESD: DMD2 with an entropic fake score, one step.",
    "Choose it where samples of different conditions look too much alike, for example the poses of one object. The "
    "entropy over all conditions keeps them apart. Samples of one condition become more alike, as under guidance: "
    "accuracy rises and recall falls. It costs one more guided pass of the fake score.",
    methods.Entropic(
        methods.DMD2(
            every=2,
            gan=0.1,  # as DMD2's; without a GAN recall falls to .73, below .8 of the teacher's
            gan_fake=0.03,
            times=LEVELS,
            fake_times=TRAINED,
        ),
        entropy=0.25,  # the paper's .5 is for poses of one object; lambda = 0 is DMD2
    ),
    LOW,
    max_train_steps=2900,
    learning_rate=5e-4,
    fake_learning_rate=1e-3,
)
add(
    "disback",
    "DisBack: DMD2 along the degradation of the teacher, backwards; one step.",
    "Choose it where the student starts far from the teacher's samples. It needs a recorded teacher, which takes a "
    "training run of its own. Without the record it equals DMD2.",
    methods.DisBack(
        guidance=1.0,
        every=2,
        gan=0.1,
        gan_fake=0.03,
        times=LEVELS,
        fake_times=TRAINED,
        gan_times=TRAINED,
        interval=100,
    ),
    LOW,
    note="Pass --method.record runs/digits/degradation, which --method degradation has made; without it this is DMD2. "
    "The iterations of both are DMD2's.",
    max_train_steps=2000,
    learning_rate=4e-4,
    fake_learning_rate=6e-4,
)
add(
    "degradation",
    "The first stage of DisBack: a copy of the teacher learns the samples of the untrained student.",
    "Choose it to record the path that DisBack follows back. Its result is not a student.",
    Degradation(fake_times=TRAINED),
    LOW,  # as DisBack's
    note="Its checkpoints are what counts, and --method disback goes back along them. The student is not trained: "
    "exported is the teacher, called once.",
    max_train_steps=400,
    learning_rate=6e-4,
    lr_scheduler="constant",
    lr_warmup_steps=0,
    checkpointing_steps=100,  # code
    checkpoints_total_limit=None,
    ema_half_life=0,
)
add(
    "msd",
    "Multi-Student Distillation, Song et al. 2024, arXiv 2410.23274: DMD2, two students of five labels each.",
    "Choose it where one student is too small for all conditions: each student learns some of them. All students must "
    "be stored, and each is trained on a part of the data only.",
    DMD2,
    LOW,
    Digits(classes=(0, 1, 2, 3, 4)),
    note="This is the student of 0 to 4; --data.classes 5 6 7 8 9 --output_dir runs/digits/msd-1 is the other. One "
    "pipeline of both: python -m pipelines.experts runs/digits/msd-0/pipeline runs/digits/msd-1/pipeline --output_dir "
    "runs/digits/msd/pipeline.",
    output_dir=f"{FOLDER}/msd-0",
    max_train_steps=1200,  # of each student: half of one for all
    learning_rate=4e-4,
    fake_learning_rate=6e-4,
)
add(
    "phased",
    "Phased DMD: two steps, an expert each.",
    "Choose it for several steps, each by its own expert, with a teacher that is too large to hold several times. The "
    "phases are trained one after the other, so a later phase cannot repair an earlier one. The student takes its own "
    "number of steps only.",
    methods.PhasedDMD(guidance=1.0, every=2, times=Uniform(0.02, 0.98), fake_times=Uniform(0.02, 1.0)),
    StudentConfig(steps=2, phases=2),  # calls at sigma 80 and .625
    note="This is the first expert. The second, and with both the pipeline: --output_dir runs/digits/phased "
    "--student.experts runs/digits/phased-1/checkpoint-1200.",
    output_dir=f"{FOLDER}/phased-1",
    max_train_steps=1200,  # of each expert: half of one student's
    learning_rate=4e-4,
    fake_learning_rate=6e-4,
)
add(
    "ladd",
    "LADD: one step, a GAN in the teacher's features and nothing else.",
    "Choose it where there are images and no memory for a fake score. A GAN alone loses modes, at worst all but one: "
    "watch recall.",
    methods.LADD(taps=("down_blocks.0", "mid_block"), gan_times=TRAINED),
    LOW,
    note="The student is slow and the heads fast: at 2e-4 and 4e-4 it came to a single image a label (recall 0).",
    max_train_steps=4800,
    learning_rate=5e-5,
    fake_learning_rate=6e-4,
)
add(
    "moments",
    "Moment matching: two steps, from the scans and two scores.",
    "Choose it where there are images and a few steps are wanted without a GAN. It keeps the modes. These values are a "
    "first try, and details are missing: DMD2 is far nearer to its teacher.",
    methods.MomentMatching(times=LEVELS),
    TWO,
    note="The pipeline of the digits renoises with fresh noise. The paper's ancestral steps need a table: "
    "recipes/moments_sd15.py.",
    max_train_steps=2400,
    learning_rate=4e-4,
    fake_learning_rate=6e-4,
)
add(
    "sign",
    "SIGN (experimental): an idempotent one-step student.",
    "Choose it to study it: its equation is a reconstruction. Otherwise take DMD2 or VSD, which it extends.",
    methods.SIGN(idem=0.1, rec=0.1, flow=0.1, denoise=0.1, times=LEVELS, fake_times=TRAINED),
    LOW,
    max_train_steps=1200,
    learning_rate=4e-4,
)

# ---- consistency: the student agrees with itself along the teacher's ODE, or along noise ----

add(
    "lcd",
    "Consistency distillation (CD): one or two steps from one student.",
    "Choose it where one student must work with one step and with several, and training must be simple. Its samples "
    "are noisy unless the teacher is guided. A small huber_c is unstable at a high learning rate.",
    LCD,
    TWO,
    max_train_steps=4000,
    learning_rate=1e-3,
    adam_beta1=0.9,
    ema_half_life=20_000,
)
add(
    "rglcd",
    "RG-LCD: consistency distillation and a reward that the student knows by proxy.",
    "Choose it where a reward has no gradient, or where its gradient through the decoder costs too much. The learned "
    "proxy is right only near samples that it has seen: watch proxy_right, and keep the weight low enough that the "
    "student stays there.",
    methods.RGLCD(LCD, weight=0.01, reward="labels", tau=1.0),  # tau: of log p of a label, no cosine
    TWO,
    note="The reward is how sure a linear classifier is of the label; the digits have no decoder, so here the proxy "
    "only stands between. --method.weight 0 is CD itself.",
    max_train_steps=2750,  # CD's 4000 make as many network calls
    learning_rate=1e-3,
    adam_beta1=0.9,
    ema_half_life=20_000,
)
add(
    "tcd",
    "TCD: one or two steps from one student.",
    "Choose it where the number of steps is chosen after training, from two upwards. One prediction serves the ends "
    "of all jumps, and a single step from pure noise loses modes.",
    methods.TCD(N=18, solver="heun", guidance=1.15, target_ema=0.9, huber_c=0.1),  # as CD's, but for the ends
    TWO,
    note="The pipeline of the digits renoises with fresh noise, TCD's gamma = 1.",
    max_train_steps=4000,
    learning_rate=1e-3,
    adam_beta1=0.9,
    ema_half_life=20_000,
)
add(
    "ect",
    "ECT: one step, from the teacher's weights and the scans alone.",
    "Choose it where there are many images and a teacher is expensive to call. The two noise levels of a pair "
    "approach each other in stages, so a short run stays blurred. The value of the loss says little.",
    methods.CT(ECTCurriculum(LogNormal(-0.8, 1.6), every=750)),  # eight stages
    HIGH,
    note="The teacher is where the student starts, and is not called.",
    max_train_steps=6000,  # CD's 4000 make as many network calls
    learning_rate=1e-3,
    adam_beta1=0.9,
    ema_half_life=20_000,
)
add(
    "ict",
    "iCT's curriculum: one step, from the scans alone.",
    "Choose it for long runs where there is no good teacher. With few images its targets are noisy, and c must grow "
    "with the dimension of a sample.",
    methods.CT(
        ICTCurriculum(n_0=10, n_1=160, steps=6000, low=0.02, high=20.0, mean=-0.8, std=1.6),  # five stages
        c=0.0043,  # paper: 0.00054 times the root of 64 pixels
    ),
    HIGH,
    note="iCT starts from nothing; here the student starts from the teacher, as every student does, which is not "
    "called.",
    max_train_steps=6000,  # CD's 4000 make as many network calls
    learning_rate=1e-3,
    adam_beta1=0.9,
    ema_half_life=20_000,
)
add(
    "slct",
    "sLCT's terms: one step, from the scans alone.",
    "Choose it for latents with outliers and without a teacher. It couples the noise over all images of a micro-batch "
    "that share a condition. There must be many of them, so it suits one or few classes.",
    methods.SLCT(ICTCurriculum(n_0=10, n_1=160, steps=6000, low=0.02, high=20.0, mean=-0.8, std=1.6), c=8.0),
    HIGH,
    note="The student starts from the teacher, which is not called.",
    max_train_steps=6000,  # CD's 4000 make as many network calls
    learning_rate=1e-3,
    adam_beta1=0.9,
    ema_half_life=20_000,
)
add(
    "tcm",
    "TCM: one step, from ECT's student and the scans alone.",
    "Choose it after ECT or iCT, for one step and with many images. It is as good as its first stage below s' and is "
    "not trained for lower noise levels: two steps are at 20 and s'.",
    methods.TCM(ECTCurriculum(StudentT(high=20.0), q=256.0, every=MOST)),  # the pairs of ECT's last stage
    HIGH,
    note="Pass --student.init runs/digits/ect/checkpoint-6000, which --method ect has made; without it the first stage "
    "is the teacher itself, which is no consistency function. The teacher is not called.",
    max_train_steps=4800,  # CD's 4000 make as many network calls
    learning_rate=5e-4,
    adam_beta1=0.9,
    ema_half_life=20_000,
)
add(
    "boot",
    "BOOT: one step, from noise and labels alone.",
    "Choose it where there are no images and no memory for a second trained network. At each noise level it learns "
    "from its own answer at the level before, so early errors are passed on.",
    methods.BOOT(solver="heun", guidance=1.2),
    HIGH,
    max_train_steps=2000,  # half of sCM's: the boundary is a second forward and backward
    learning_rate=7e-4,
    adam_beta1=0.9,
    ema_half_life=20_000,
)
add(
    "scm",
    "sCM: one step.",
    "Choose it where there are images and no memory for a second trained network: it has no fake score and no "
    "discriminator. It differentiates the network in time. Without warm-up, or where the network is not smooth in "
    "time, the tangent explodes: watch student/tangent.",
    methods.SCM(sigma_d=0.75, times=LogNormal(-0.8, 1.6), warmup=300, guidance=1.2),
    SMOOTH,
    max_train_steps=4000,
    learning_rate=7e-4,
    adam_beta1=0.9,
    ema_half_life=20_000,
)
add(
    "sprint",
    "SANA-Sprint's sCM and LADD: one step.",
    "Choose it for one to four steps with a large flow-matching teacher: sCM keeps the modes, LADD sharpens. It can "
    "fail as sCM fails and as LADD fails.",
    methods.Sprint(
        guidance=1.2,  # the digits' network is told no guidance, so it is a fixed one
        sigma_d=0.75,
        times=LogNormal(-0.8, 1.6),
        warmup=300,
        c=0.1,
        norm="rms",
        reduction="mean",
        gan=0.02,
        gan_times=TRAINED,
        places=False,
    ),
    SMOOTH,
    max_train_steps=2300,  # 10.3 passes each; sCM takes 4000 of 6.0
    learning_rate=7e-4,
    adam_beta1=0.9,
    ema_half_life=20_000,
)
add(
    "rcm",
    "rCM: one step.",
    "Choose it where sCM alone is blurred and a third network fits into memory. With too large a lambda it loses "
    "modes as DMD does.",
    methods.RCM(
        guidance=1.2,
        sigma_d=0.75,
        times=LogNormal(-0.8, 1.6),
        warmup=300,
        norm="rms",
        reduction="mean",
        dmd=0.005,  # of means
        dmd_times=LEVELS,
        every=2,
    ),
    SMOOTH,
    max_train_steps=3000,
    learning_rate=7e-4,
    fake_learning_rate=1e-3,
    adam_beta1=0.9,
    ema_half_life=20_000,
)
add(
    "meanflow",
    "MeanFlow: one step, along the velocity of the teacher.",
    "Choose it where there are images and one network must work with one step or a few, without a discriminator or a "
    "fake score. It differentiates the network in both times. A network that is not smooth in time makes it unstable, "
    "as in sCM.",
    methods.MeanFlow(
        velocity="teacher",
        guidance=1.2,
        times=LogitNormal(0.4, 1.6),
        equal=0.25,
        p=0.5,  # with 1 the levels of little noise, whose error is small, weigh most: one call then makes one image
        warmup=300,
    ),
    SMOOTH,
    max_train_steps=4000,  # as sCM
    learning_rate=7e-4,
    adam_beta1=0.9,
    ema_half_life=20_000,
)
add(
    "twinflow",
    "TwinFlow: one step, from scans.",
    "Choose it where there are images, one network must work with any number of steps and no fake score fits. Its "
    "twin is the same network at negative times: it takes capacity and more passes, and it lags behind as a fake "
    "score does.",
    methods.TwinFlow(rectify=0.5),
    HIGH,
    max_train_steps=1600,  # a third of sCM's steps and more: six passes a step, three of them backward too
    learning_rate=7e-4,
    adam_beta1=0.9,
    ema_half_life=20_000,
)

# ---- before and after: where a student starts, and what tunes a finished one ----

add(
    "tsm",
    "Teacher score matching: a network of 77,009 weights for one of 160,401.",
    "Choose it to initialise a student that is smaller than its teacher and cannot start as a copy. The result is a "
    "denoiser: its single step is blurred until a distillation follows.",
    methods.TSM(times=TRAINED),
    StudentConfig(network=SMALL),
    note="Any method starts from it, its student the same network: --method sid --student.network recipes/digits_small "
    "--student.init runs/digits/tsm/checkpoint-2000. What is exported here is the denoiser called once.",
    max_train_steps=2000,
    learning_rate=2e-3,
    adam_beta1=0.9,
    ema_half_life=20_000,
)
add(
    "nct",
    "NCT: a control adapter on a finished one-step student. Samples follow a coarse picture.",
    "Choose it where a finished student must follow a coarse picture that can be computed from every sample. With too "
    "large a bound, or a small lambda, samples lose their diversity. With a small bound the control is learned "
    "slowly.",
    methods.NCT(control="downsample", factor=2, levels=5, bound=3e-3),
    teacher=DMD2_STUDENT,
    note="The teacher is any exported one-step student of the digits. `python -m pipelines.control "
    "runs/digits/nct/pipeline` measures how well it keeps to pictures: on DMD2's student, mean |c(x) - y| is .055 with "
    "the adapter and .117 without (pixels in [0, 1]). With --method.dual 0 --method.rate 0, nothing holds the samples "
    "at the base's, and it is .286 after 300 steps.",
    max_train_steps=600,
    learning_rate=3e-3,
    adam_beta1=0.9,
)
add(
    "pso",
    "PSO of a finished student: of two samples it prefers the one that a linear classifier is more certain of.",
    "Choose it where two samples can be compared, with or without a gradient.",
    methods.PSO(reward="labels"),
    StudentConfig(steps=2),  # of --smoke alone, whose teacher is no student: else its teacher's
    teacher=LCD_STUDENT,
    note="The teacher is any exported student of two calls or more. On CD's student, two sets of 4000 samples: the "
    "classifier's mean log p rises from -.051 to -.015, and another network, which judged nothing here, reads .3 % of "
    "the digits as another than asked, not .8 %. It has a price: the Frechet distance of that network's features to "
    "held-out scans grows from 14 to 29. With --learning_rate 4e-4 the loss ends above log 2, where it began.",
    max_train_steps=300,
    learning_rate=1e-4,
    adam_beta1=0.9,
    max_grad_norm=1.0,
    ema_half_life=1000,
)
add(
    "pso_offline",
    "PSO of a finished student on data: it prefers scans of bold strokes to its own samples.",
    "Choose it where a finished student must take on a look without a second distillation. Stop early and watch "
    "diversity.",
    methods.OfflinePSO(beta=50.0, loss="hinge", gamma=5.0),  # the errors are about .1
    data=Bold(),
    teacher=LCD_STUDENT,
    note="The teacher is any exported student. On CD's student, two sets of 4000 samples: the mean ink goes from .311 "
    "to .355, past the .345 of the bold scans, and the standard deviation within a label from .34 to .24, theirs being "
    ".30: what the student made before is pushed away, not only left. So the Frechet distance to the bold scans grows, "
    "from 54 to 89, in the features of another network. With the values for SDXL-Turbo (beta 5, gamma .5, 2e-4) ink "
    "overshoots to .416, with --method.loss sigmoid to .430.",
    max_train_steps=300,
    learning_rate=1e-4,
    adam_beta1=0.9,
    max_grad_norm=1.0,
    ema_half_life=1000,
)
