"""The distillation methods, one file each: the equations and their code."""

from distill.methods.boot import BOOT
from distill.methods.ct import CT
from distill.methods.denoise import Denoise
from distill.methods.diff_instruct import DiffInstruct
from distill.methods.disback import DisBack
from distill.methods.dmd import DMD
from distill.methods.dmd2 import DMD2
from distill.methods.f_distill import FDistill
from distill.methods.ladd import LADD
from distill.methods.lcd import LCD
from distill.methods.meanflow import MeanFlow
from distill.methods.moments import MomentMatching
from distill.methods.nct import NCT
from distill.methods.pcm import PCM
from distill.methods.phased import PhasedDMD
from distill.methods.pso import PSO
from distill.methods.pso_offline import OfflinePSO
from distill.methods.rcgm import RCGM
from distill.methods.rcm import RCM
from distill.methods.regression import Regression
from distill.methods.scm import SCM
from distill.methods.sid import SiD
from distill.methods.sida import SiDA
from distill.methods.sign import SIGN
from distill.methods.slct import SLCT
from distill.methods.sprint import Sprint
from distill.methods.sun import SUN
from distill.methods.tcd import TCD
from distill.methods.tcm import TCM
from distill.methods.tsm import TSM
from distill.methods.twinflow import TwinFlow
from distill.methods.vsd import VSD
from distill.methods.wrappers.entropic import Entropic
from distill.methods.wrappers.forget import SFD
from distill.methods.wrappers.nasa import NASAT
from distill.methods.wrappers.reward import RewardGuided
from distill.methods.wrappers.rg_lcd import RGLCD

__all__ = [
    "BOOT",
    "CT",
    "Denoise",
    "DiffInstruct",
    "DisBack",
    "DMD",
    "DMD2",
    "Entropic",
    "FDistill",
    "LADD",
    "LCD",
    "MeanFlow",
    "MomentMatching",
    "NASAT",
    "NCT",
    "OfflinePSO",
    "PCM",
    "PhasedDMD",
    "PSO",
    "RCGM",
    "RCM",
    "Regression",
    "RewardGuided",
    "RGLCD",
    "SCM",
    "SFD",
    "SiD",
    "SiDA",
    "SIGN",
    "SLCT",
    "Sprint",
    "SUN",
    "TCD",
    "TCM",
    "TSM",
    "TwinFlow",
    "VSD",
]
