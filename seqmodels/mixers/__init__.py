"""Sequence mixers behind one contract, and the registry that builds them by name."""

from typing import Any

from seqmodels.mixers.attention import Attention, AttentionConfig
from seqmodels.mixers.base import Mixer, MixerConfig, ParamLabel, RecurrentState, Segments, State
from seqmodels.mixers.based import Based, BasedConfig
from seqmodels.mixers.bidirectional import Bidirectional, BidirectionalConfig
from seqmodels.mixers.conv import Conv, ConvConfig
from seqmodels.mixers.deltanet import DeltaNet, DeltaNetConfig
from seqmodels.mixers.gam import GAM, GAMConfig
from seqmodels.mixers.gated_conv import GatedConv, GatedConvConfig
from seqmodels.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from seqmodels.mixers.gla import GLA, GLAConfig
from seqmodels.mixers.hgrn2 import HGRN2, HGRN2Config
from seqmodels.mixers.hydra import Hydra, HydraConfig
from seqmodels.mixers.hyena import Hyena, HyenaConfig
from seqmodels.mixers.jrt import JRT, JRTConfig
from seqmodels.mixers.kda import KDA, KDAConfig
from seqmodels.mixers.lightning import Lightning, LightningConfig
from seqmodels.mixers.lru import LRU, LRUConfig
from seqmodels.mixers.mamba import Mamba, MambaConfig
from seqmodels.mixers.mamba2 import Mamba2, Mamba2Config
from seqmodels.mixers.mamba3 import Mamba3, Mamba3Config
from seqmodels.mixers.mom import MoM, MoMConfig
from seqmodels.mixers.monarch import Monarch, MonarchConfig
from seqmodels.mixers.orchid import Orchid, OrchidConfig
from seqmodels.mixers.parallel import Parallel, ParallelConfig
from seqmodels.mixers.rat import RAT, RATConfig
from seqmodels.mixers.retnet import RetNet, RetNetConfig
from seqmodels.mixers.rg_lru import RGLRU, RGLRUConfig
from seqmodels.mixers.s4 import S4, S4Config
from seqmodels.mixers.s4d import S4D, S4DConfig
from seqmodels.mixers.s5 import S5, S5Config
from seqmodels.mixers.scout import SCOUT, SCOUTConfig
from seqmodels.mixers.sgconv import SGConv, SGConvConfig
from seqmodels.mixers.shared import GMU, CrossAttention, CrossAttentionConfig, GMUConfig
from seqmodels.mixers.sliding_window import SlidingWindow, SlidingWindowConfig

REGISTRY: dict[str, tuple[type[MixerConfig], type[Mixer]]] = {
    "attention": (AttentionConfig, Attention),
    "based": (BasedConfig, Based),
    "bidirectional": (BidirectionalConfig, Bidirectional),
    "conv": (ConvConfig, Conv),
    "deltanet": (DeltaNetConfig, DeltaNet),
    "gam": (GAMConfig, GAM),
    "gated_conv": (GatedConvConfig, GatedConv),
    "gated_deltanet": (GatedDeltaNetConfig, GatedDeltaNet),
    "gla": (GLAConfig, GLA),
    "hgrn2": (HGRN2Config, HGRN2),
    "hydra": (HydraConfig, Hydra),
    "hyena": (HyenaConfig, Hyena),
    "jrt": (JRTConfig, JRT),
    "kda": (KDAConfig, KDA),
    "lightning": (LightningConfig, Lightning),
    "lru": (LRUConfig, LRU),
    "mamba": (MambaConfig, Mamba),
    "mamba2": (Mamba2Config, Mamba2),
    "mamba3": (Mamba3Config, Mamba3),
    "mom": (MoMConfig, MoM),
    "monarch": (MonarchConfig, Monarch),
    "orchid": (OrchidConfig, Orchid),
    "parallel": (ParallelConfig, Parallel),
    "rat": (RATConfig, RAT),
    "retnet": (RetNetConfig, RetNet),
    "rg_lru": (RGLRUConfig, RGLRU),
    "s4": (S4Config, S4),
    "s4d": (S4DConfig, S4D),
    "s5": (S5Config, S5),
    "scout": (SCOUTConfig, SCOUT),
    "sgconv": (SGConvConfig, SGConv),
    "sliding_window": (SlidingWindowConfig, SlidingWindow),
}
"""Registered name -> config class, module class."""

READERS: dict[str, tuple[type[MixerConfig], type[Mixer]]] = {
    "cross_attention": (CrossAttentionConfig, CrossAttention),
    "gmu": (GMUConfig, GMU),
}
"""The same of what stands in a backbone only: it reads an earlier block."""


def build(config: MixerConfig, width: int, **module: Any) -> Mixer:
    """The mixer that ``config`` describes, for inputs ``(B, L, width)``; ``module``: name, parent.

    Raises:
      ValueError: the config's name is not registered.
    """
    known = REGISTRY | READERS
    if config.mixer not in known:
        raise ValueError(f"mixer={config.mixer!r} is not registered; known: {', '.join(known)}")
    return known[config.mixer][1](config=config, width=width, **module)


__all__ = [
    "GAM",
    "GLA",
    "GMU",
    "HGRN2",
    "JRT",
    "KDA",
    "LRU",
    "RAT",
    "READERS",
    "REGISTRY",
    "RGLRU",
    "S4",
    "S4D",
    "S5",
    "SCOUT",
    "Attention",
    "AttentionConfig",
    "Based",
    "BasedConfig",
    "Bidirectional",
    "BidirectionalConfig",
    "Conv",
    "ConvConfig",
    "CrossAttention",
    "CrossAttentionConfig",
    "DeltaNet",
    "DeltaNetConfig",
    "GAMConfig",
    "GLAConfig",
    "GMUConfig",
    "GatedConv",
    "GatedConvConfig",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "HGRN2Config",
    "Hydra",
    "HydraConfig",
    "Hyena",
    "HyenaConfig",
    "JRTConfig",
    "KDAConfig",
    "LRUConfig",
    "Lightning",
    "LightningConfig",
    "Mamba",
    "Mamba2",
    "Mamba2Config",
    "Mamba3",
    "Mamba3Config",
    "MambaConfig",
    "Mixer",
    "MixerConfig",
    "MoM",
    "MoMConfig",
    "Monarch",
    "MonarchConfig",
    "Orchid",
    "OrchidConfig",
    "Parallel",
    "ParallelConfig",
    "ParamLabel",
    "RATConfig",
    "RGLRUConfig",
    "RecurrentState",
    "RetNet",
    "RetNetConfig",
    "S4Config",
    "S4DConfig",
    "S5Config",
    "SCOUTConfig",
    "SGConv",
    "SGConvConfig",
    "Segments",
    "SlidingWindow",
    "SlidingWindowConfig",
    "State",
    "build",
]
