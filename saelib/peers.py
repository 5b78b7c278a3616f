"""Other libraries' training steps, each through the calls that it makes public, from our weights on our tensors.

What cannot be made the same work is said in `differs`, and stands beside the measured figure. Each class is imported
only if its library is installed: `pip install -e '.[peers]'`.
"""
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from saelib import formats
from saelib.contestants import AUXK_COEF, DEAD_AFTER, DEAD_EVERY, L1_COEF, LONG_DEAD, LR, RELU, Setting
from saelib.sae import SAE


class SAELens:
    """`SAETrainer.step`, with the sparse activations that the library offers for TopK, or without."""
    library, distribution = "sae_lens", "sae-lens"
    differs = "no unit rows (it scales by their norms); AuxK not normalised"

    def __init__(self, setting: Setting, case: str, lr: float = LR, sparse: bool = False):
        from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer
        size = dict(d_in=setting.d_model, d_sae=setting.n_latents, device=setting.device, apply_b_dec_to_input=True)
        if case in RELU:
            sae = StandardTrainingSAE(StandardTrainingSAEConfig(l1_coefficient=L1_COEF, **size))
        else:
            sae = TopKTrainingSAE(TopKTrainingSAEConfig(k=setting.k, use_sparse_activations=sparse,
                                                        aux_loss_coefficient=AUXK_COEF,
                                                        rescale_acts_by_decoder_norm=not sparse, **size))
        own, self.k, self.rescaled = setting.start(case), setting.k, not sparse
        if case in RELU:
            self.differs = "no unit rows: its penalty scales by their norms"
        elif sparse:  # its backward pass fails on sparse activations that were scaled
            self.differs = "rows of any norm; AuxK not normalised"
        with torch.no_grad():
            for theirs, ours in ((sae.W_enc, own.W_enc.t()), (sae.b_enc, own.b_enc), (sae.W_dec, own.W_dec),
                                 (sae.b_dec, own.b_pre)):
                theirs.copy_(ours)
        config = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=setting.batch_size, lr=lr,
                                  lr_end=lr,
                                  device=setting.device, autocast=setting.device == "cuda",
                                  dead_feature_window=DEAD_AFTER)
        self.trainer = SAETrainer(config, sae.to(setting.device), data_provider=iter(()))
        if case == "auxk":
            self.trainer.n_forward_passes_since_fired[::DEAD_EVERY] = LONG_DEAD

    def step(self, x: Tensor) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1  # its `step` leaves this to the caller

    def n_dead(self) -> int:
        return int(self.trainer.dead_neurons.sum())

    def trained(self) -> SAE:
        sae = self.trainer.sae
        norm = sae.W_dec.norm(dim=1) if self.rescaled else torch.ones_like(sae.b_enc)
        return formats.build(sae.W_enc.t() * norm[:, None], sae.b_enc * norm, sae.W_dec / norm[:, None], sae.b_dec,
                             "topk", self.k)


class DictionaryLearning:
    """`TopKTrainer.update` and `StandardTrainer.update`; under bf16 autocast on a GPU, as its `trainSAE` offers."""
    library, distribution = "dictionary_learning", "dictionary-learning"

    def __init__(self, setting: Setting, case: str, lr: float = LR):
        from dictionary_learning.trainers.standard import StandardTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer
        size = dict(steps=10**6, activation_dim=setting.d_model, dict_size=setting.n_latents, layer=0, lm_name="none",
                    lr=lr, warmup_steps=1, device=setting.device)
        if case in RELU:
            self.trainer = StandardTrainer(l1_penalty=L1_COEF, sparsity_warmup_steps=1, **size)
            self.differs = "does not clip, nor count what fired"
        else:
            self.trainer, self.differs = TopKTrainer(k=setting.k, auxk_alpha=AUXK_COEF, **size), ""
            self.trainer.dead_feature_threshold = DEAD_AFTER
        # not 0: there it would find a median first
        own, ae, self.k, self.steps = setting.start(case), self.trainer.ae, setting.k, 1
        b_dec = ae.bias if case in RELU else ae.b_dec
        with torch.no_grad():
            for theirs, ours in ((ae.encoder.weight, own.W_enc), (ae.encoder.bias, own.b_enc),
                                 (ae.decoder.weight, own.W_dec.t()), (b_dec, own.b_pre)):
                theirs.copy_(ours)
        if case == "auxk":
            self.trainer.num_tokens_since_fired[::DEAD_EVERY] = LONG_DEAD

    def step(self, x: Tensor) -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            self.trainer.update(self.steps, x)
        self.steps += 1

    def n_dead(self) -> int:
        return int((getattr(self.trainer, "num_tokens_since_fired", torch.zeros(1)) > DEAD_AFTER).sum())

    def trained(self) -> SAE:
        ae = self.trainer.ae
        return formats.build(ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.t(), ae.b_dec, "topk", self.k)


class Sparsify:
    """`SparseCoder` with the calls of its `Trainer`, in their order: that trainer itself wants a language model."""
    library, distribution, differs = "sparsify", "eai-sparsify", "loss divided by the variance; does not clip"

    def __init__(self, setting: Setting, case: str, lr: float = LR):
        if setting.device == "cpu":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its own switch; its decoder in Triton runs on GPUs only
        from sparsify import SparseCoder, SparseCoderConfig
        self.coder = SparseCoder(setting.d_model, SparseCoderConfig(num_latents=setting.n_latents, k=setting.k),
                                 device=setting.device)
        own, coder = setting.start(case), self.coder
        with torch.no_grad():
            for theirs, ours in ((coder.encoder.weight, own.W_enc), (coder.encoder.bias, own.b_enc),
                                 (coder.W_dec, own.W_dec), (coder.b_dec, own.b_pre)):
                theirs.copy_(ours)
        self.adam = torch.optim.Adam(coder.parameters(), lr=lr)
        self.since = torch.zeros(setting.n_latents, dtype=torch.int64, device=setting.device)
        if case == "auxk":
            self.since[::DEAD_EVERY] = LONG_DEAD

    def step(self, x: Tensor) -> None:
        self.coder.set_decoder_norm_to_unit_norm()
        out = self.coder(x, dead_mask=self.since > DEAD_AFTER)
        (out.fvu + AUXK_COEF * out.auxk_loss).backward()
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.adam.step()
        self.adam.zero_grad()
        fired = torch.zeros_like(self.since, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        self.since += len(x)
        self.since[fired] = 0

    def n_dead(self) -> int:
        return int((self.since > DEAD_AFTER).sum())

    def trained(self) -> SAE:
        coder = self.coder
        return formats.build(coder.encoder.weight, coder.encoder.bias, coder.W_dec, coder.b_dec, "topk", coder.cfg.k)


def peers(setting: Setting, case: str, lr: float = LR) -> dict[tuple[str, str], Callable[[], object]]:
    """(case, name) -> what makes it, for the libraries that are installed and have the case."""
    made = {"SAELens, dense": (SAELens, {}), "SAELens, sparse COO": (SAELens, {"sparse": True}),
            "dictionary_learning": (DictionaryLearning, {}), "sparsify": (Sparsify, {})}
    if case in RELU:
        made = {"SAELens": (SAELens, {}), "dictionary_learning": (DictionaryLearning, {})}
    return {(case, name): (lambda make=make, more=more: make(setting, case, lr, **more))
            for name, (make, more) in made.items() if importlib.util.find_spec(make.library)}
