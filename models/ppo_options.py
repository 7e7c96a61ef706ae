"""The options of PPO: section `ppo` of params.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from models.advantages import KL_ESTIMATORS
from models.ptx import PtxOptions


@dataclass(frozen=True)
class PPOOptions(PtxOptions):
    """Section `ppo` of params.yaml. Lengths in tokens, KL in nats an answer.

    reward: "score" is the reward model's r as it is; "probability" is its probability of a thumb up, which saturates, so
    that an answer is not chased for being rated ever higher (a bounded reward hinders reward hacking: Fu et al. 2025).
    kl_estimator: k1, k2 or k3 (see kl_estimate) in the reward. dual_clip: no step counts a bad answer more than this many
    times its advantage (Ye et al. 2020; 3 is usual), null for no bound. ema_decay: what is saved is the moving average of
    the policy over its steps (InstructGPT: 0.992), null for the last weights. missing_eos_penalty: the score of an answer
    that did not end by itself, in place of the reward model's; null leaves that.

    critic: "own" is a network of its own that starts as the reward model: it learns at its own rate and disturbs nobody.
    "shared" is a head on the policy that starts at 0, with one forward and backward pass for both losses, its own times
    value_coefficient: twice as fast and with half the memory, for models too large for two, and short runs of a small
    learning rate; the reward model's knowledge is lost to it, and a coefficient too large costs the policy its language.
    micro_batch: episodes in memory at a time (of each process), null for a whole minibatch; the gradient stays the same.
    rollout_width: answers that are sampled side by side (in each process), null for all; an answer's text is promised per
    width, so give one to have the same answers from any number of processes. rollout_correction: the most that the policy
    loss of a token is multiplied by for being likelier now than when it was sampled (rollout_weights); null for no such
    weight, as when the sampler computes what the trainer does.
    """

    iterations: int = 20
    batch_size: int = 96
    minibatches: int = 2
    epochs: int = 2
    max_new_tokens: int = 32
    temperature: float = 1.0
    learning_rate: float = 6e-4
    critic_learning_rate: float = 1e-3
    warmup_steps: int = 4
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    gamma: float = 1.0
    gae_lambda: float = 0.95
    dual_clip: float | None = None
    kl_coefficient: float = 0.06
    kl_estimator: str = "k1"
    kl_target: float | None = None
    kl_horizon: int = 2000
    reward: str = "probability"
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None
    critic: str = "own"
    value_coefficient: float = 0.1
    micro_batch: int | None = None
    rollout_width: int | None = None
    rollout_correction: float | None = None
    ema_decay: float | None = None
    clip_norm: float = 1.0
    checkpoint_every: int = 4
    log_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("iterations", "batch_size", "minibatches", "epochs", "max_new_tokens")
        if self.reward not in ("score", "probability"):
            raise ValueError(f"reward must be score or probability, not {self.reward}")
        if self.batch_size % self.minibatches:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of minibatches {self.minibatches}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        for name in ("critic_learning_rate", "clip_range", "value_clip_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        self.not_negative("kl_coefficient", "value_coefficient")
        if self.critic not in ("own", "shared"):
            raise ValueError(f"critic must be own or shared, not {self.critic}")
        self.at_least_one(*(n for n in ("micro_batch", "rollout_width") if getattr(self, n) is not None))
        if self.rollout_correction is not None and not self.rollout_correction >= 1:
            raise ValueError(f"rollout_correction must be at least 1, or null: {self.rollout_correction}")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(f"kl_estimator must be one of {', '.join(KL_ESTIMATORS)}, not {self.kl_estimator}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, or null: {self.dual_clip}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, or null: {self.ema_decay}")
        if self.kl_target is not None:
            self._check_controller(self.kl_target)

    def _check_controller(self, target: float) -> None:
        if not target > 0:
            raise ValueError(f"kl_target must be above 0 nats an answer, or null: {target}")
        if not self.kl_coefficient > 0:
            raise ValueError("kl_target needs a kl_coefficient above 0 to start from")
        if self.kl_horizon < self.batch_size:
            raise ValueError(
                f"kl_horizon {self.kl_horizon} must be at least batch_size {self.batch_size} episodes: the coefficient "
                "would change by more than a fifth at once"
            )
