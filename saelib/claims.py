"""The claims that the book puts to the test, each with the criterion that was written before the run."""
from collections.abc import Callable
from dataclasses import dataclass

from saelib import criteria, speed_criteria


@dataclass(frozen=True)
class Claim:
    """One claim: its words, where the paper makes it, the criterion in words, the paper's own figure, and the same
    criterion as a function from the measured values to (a line that says them, whether each part held)."""
    claim: str
    section: str
    criterion: str
    paper: str
    judge: Callable[..., tuple[str, list[bool]]]


CLAIMS = {
    "A1.1": Claim("ReLU with an L1 penalty trains a working SAE, and λ sets the trade-off", "§2.2",
                  "In every seed L0 falls and normalized MSE rises with each step of λ, and some λ gives L0 below half "
                  "of d_model with less error than as many principal components",
                  "the baseline; no figure given", criteria.l1_trades),
    "A1.2": Claim("L1 pulls on every active latent with the same force, L2 with a force that vanishes", "ours, on §2.2",
                  "Autograd's derivative of the penalty is λ for every active latent and 2λz for L2, to a relative "
                  "1e-5; L2's least is below 1 % of its largest",
                  "no figure given", criteria.constant_pull),
    "A1.3": Claim("The constant pull makes exact zeros; L2 does not", "ours, on §2.2",
                  "The 1-D minimiser is exactly 0 for all 0 < x <= λ/2 under L1 and for no x > 0 under L2; at equal "
                  "error, wherever both reach it, L2 has more active latents in every seed; "
                  "L1 has more exact zeros than no penalty; and L2 with ReLU has below 1 %",
                  "no figure given", criteria.pull_makes_zeros),
    "A1.4": Claim("The subgradient that is chosen for |z| at 0 cannot matter behind a ReLU", "ours, on §2.2",
                  "Trained with the choices -1, 0, 0.5 and 1, all weights agree bit for bit on every subject in every "
                  "seed, though more than 10 % of the latents are exactly 0; "
                  "and the same comparison finds a difference in a case that is built to have one",
                  "no figure given", criteria.same_bits),
    "A1.5": Claim("A smooth approximation removes L1's corner and, without the ReLU, its exact zeros", "ours, on §2.2",
                  "The 1-D minimiser is 0 for all 0 < x <= λ/2 under L1 and for no x > 0 under any smooth L1; SAEs "
                  "without ReLU have below 0.1 % exact zeros under every smooth L1, and more under L1",
                  "no figure given", criteria.smooth_loses_zeros),
    "A1.6": Claim("L1 is a poor stand-in for L0: codes with the same L0 differ in L1, and without unit-norm decoder "
                  "rows the penalty is gamed", "§2.3 in part",
                  "Without the constraint, in every seed: the mean norm of the decoder rows is above 2, L1 below half "
                  "and L0 above that of the constrained twin. "
                  "On every subject, over tokens with exactly k active latents, the 95th percentile of L1 is more than "
                  "1.5 times the 5th",
                  "no figure given", criteria.gamed),
    "A1.7": Claim("On an orthonormal dictionary L1 shrinks active latents by half its coefficient, the largest quarter "
                  "as much to within 10 %", "§2.3, §5.1 in part",
                  "At every coefficient and in every seed, the mean shift of a trained SAE's active latents is within "
                  "5 % of l1_coef / 2, and within 10 % for the largest quarter of them",
                  "shrinkage is named, without a figure", criteria.shrinkage),
    "A2.1": Claim("TopK keeps the k largest pre-activations, by value, and trains on the squared error alone",
                  "§2.3, Eq. (2)",
                  "Without AuxK the loss has the one term squared_error; on every subject all held-out tokens have as "
                  "active latents the k largest values of a full sort, "
                  "and for more than half of them the k largest magnitudes would be others",
                  "Eq. (2)", criteria.largest_values),
    "A2.2": Claim("TopK's gradient reaches only the latents it selected: the exact Jacobian of a piecewise-linear map, "
                  "and it trains better than a straight-through one", "ours, on §2.3",
                  "Relative to its size, autograd's gradient is within 1e-12 of the mask's and 1e-6 of finite "
                  "differences, and straight-through's is more than 0.1 away; "
                  "straight-through's normalized MSE is above TopK's in every seed",
                  "no figure given", criteria.exact_jacobian),
    "A2.3": Claim("TopK's selection is discrete: its output jumps at a tie, and fewer active sets change at the end of "
                  "training than at its start", "ours, on §2.3",
                  "On a path cut 16 times finer TopK's largest step keeps more than 90 % of its size and ReLU's less "
                  "than 20 %; in every seed fewer tokens change "
                  "their active set between TopK's last two checkpoints than between its first two",
                  "no figure given", criteria.discrete),
    "A2.4": Claim("TopK's L0 is at most k by construction, and is k before any training", "§2.3",
                  "On every subject no token has more than k active latents, and at initialisation L0 is within 1 % of "
                  "k for k up to 64",
                  "k is set directly", criteria.l0_by_construction),
    "A2.5": Claim("ReLU's L0 emerges from training and has to be tuned for", "§2.3",
                  "Bisection on the L1 coefficient needs more than one run on every subject, and one coefficient gives "
                  "L0s more than a factor 2 apart over subjects and n",
                  "tuning the L1 coefficient is called a cost of ReLU; no count is given", criteria.l0_emerges),
    "A2.6": Claim("TopK hardly shrinks its active latents: refinement moves their sum by less than 2 %", "§2.3, §5.1",
                  "On every subject and in every seed, refinement changes the sum of TopK's active latents by less "
                  "than 2 %",
                  "TopK's refined values are not biased upwards (§5.1)", criteria.unbiased),
    "A3.1": Claim("Refinement moves ReLU's latents up as a whole; TopK's move less, and their sum by less than a "
                  "quarter as much", "§5.1",
                  "On every subject and in every seed: the sum of ReLU's active latents rises; TopK's absolute "
                  "changes, relative to the sum, are smaller than ReLU's; "
                  "and the change of TopK's sum is within a quarter of ReLU's",
                  "ReLU's values rise, TopK's change less and are not biased upwards (§5.1)",
                  criteria.refined),
    "A3.2": Claim("At equal L0 TopK reconstructs better than ReLU", "§2.3, Fig. 2a",
                  "On every subject and at every L0 compared, ReLU's normalized MSE is more than 1 times TopK's in "
                  "every seed",
                  "TopK below ReLU at every L0 (§2.3, Fig. 2a)", criteria.headline),
    "A3.3": Claim("The gap between TopK and ReLU grows with the number of latents", "§2.3, Fig. 2b",
                  "At L0 32, the ratio of ReLU's error to TopK's at the largest n over that at the smallest n has a 95 "
                  "% interval over seeds above 1",
                  "the gap widens with n (§2.3, Fig. 2b)", criteria.gap_grows),
    "A3.4": Claim("TopK runs are compared at equal L0, to within 1 %, ReLU runs at what comes out", "§2.3",
                  "Over seeds, TopK's L0 at one k spreads by less than 1 % and ReLU's at one coefficient by more than "
                  "TopK's",
                  "no figure given", criteria.equal_l0),
    "A3.5": Claim("TopK's lead over ReLU does not vanish from 100,000 tokens to 3 million", "ours, on §2.3",
                  "On pygpt at n = 1024 and L0 32, each method at the best rate of one grid at each length: in every "
                  "seed ReLU's error is more than 1 times TopK's "
                  "after 100,000 tokens to 3 million, and what it is above 1 at 3 million is at least half of that at "
                  "300,000",
                  "trained to convergence; no figure against the length", criteria.lead_lasts),
    "M1": Claim("Two of six definitions of normalized MSE put two of the chapter's autoencoders in opposite orders",
                "ours",
                "Among the autoencoders of the chapter, a pair that two of six definitions order oppositely, by more "
                "than 1 % under both",
                "not in the paper", criteria.opposite_orders),
    "Y1": Claim("The path from a file of activations to a frontier works for data of another scale and offset", "ours",
                "On activations each multiplied by a number from 50 to 150 and shifted by 5, every SAE's L0 and "
                "normalized MSE are within 1 % of those on the same activations before; "
                "and TopK's error falls with k",
                "not in the paper", criteria.own_activations),
    "S1": Claim("A TopK step costs little more than the encoder's product in float32, and so does a step of a whole "
                "fit", "ours",
                "At d = 256, n = 4096, k = 32, batch 2048 on the CPU, in multiples of the float32 product timed in the "
                "same rounds: "
                "a step at most 1.5, with 5 % of the latents dead and AuxK on at most 2.0, a step of a whole fit at "
                "most 1.5",
                "not in the paper", speed_criteria.cheap_step),
    "S2": Claim("At a larger width a whole step costs no more than the float32 product", "ours",
                "At d = 768, n = 12288, k = 32, batch 4096 on the CPU a step takes at most 1.0 times the float32 "
                "product timed in the same rounds",
                "not in the paper", speed_criteria.cheap_wide),
    "S3": Claim("The step is several times faster than the ordinary loop and than other libraries, on the same tensors",
                "ours",
                "At d = 256, n = 4096, k = 32, batch 2048 on the CPU: at least 5 times faster than the plain PyTorch "
                "loop, 2.8 times than sparsify, "
                "8 times than SAELens as it comes (dense)",
                "not in the paper", speed_criteria.faster),
    "S4": Claim("A ReLU step at the start of training, with half of its latents active, costs as little as five matrix "
                "products allow", "ours",
                "At d = 256, n = 4096, batch 2048 on the CPU: at most 2.4 times the float32 product with bfloat16, at "
                "most 5 in float32, "
                "and faster than the plain loop and every library measured",
                "not in the paper", speed_criteria.cheap_relu),
    "S5": Claim("Speed costs no accuracy: after equal tokens the error is that of the ordinary loop", "ours",
                "On pygpt, after the same batches, the held-out normalized MSE of the float32 and the bfloat16 step is "
                "at most 1 % above the plain loop's",
                "not in the paper", speed_criteria.equal_error),
    "S6": Claim("Training needs little memory beyond what it must hold", "ours",
                "In a fresh process on the CPU, at both sizes, the peak of resident memory rises by less than 1.3 "
                "times "
                "parameters + gradients + Adam's two moments + one block of pre-activations [256, n] + the batch",
                "not in the paper", speed_criteria.small_memory),
    "S7": Claim("Two measured rates predict what the parts of a step cost", "ours",
                "At d = 256, n = 4096, k = 32, batch 2048 on the CPU: the predictions of all parts add up to between "
                "0.5 and 1 times the float32 step, "
                "and every part that takes more than 5 % of the step takes between 1/3 and 3 times its prediction",
                "not in the paper", speed_criteria.predicted),
    "S8": Claim("Data keeps up with training", "ours",
                "On the CPU, for pygpt and minilm: activations are harvested at more than 0.9 times the speed of the "
                "model's forward passes alone, "
                "and a batch from the cache takes less than 0.05 of a training step at n = 4 d with 1024 tokens",
                "not in the paper", speed_criteria.data_keeps_up),
    "S9": Claim("On a GPU a step costs at most 1.7 to 3 of the encoder's products, by its size, and a fraction of the "
                "ordinary loop's", "ours",
                "On an NVIDIA H200 at d = 768, k = 32, in multiples of the bfloat16 product timed in the same rounds: "
                "at n = 32768 at most 3.0 with 8192 tokens "
                "and 2.3 with 65536, at n = 131072 at most 2.2 and 1.7; at least 3 times faster than the dense loop "
                "under autocast; "
                "and on pygpt, after the same batches, a held-out normalized MSE at most 1 % above that loop's",
                "not in the paper", speed_criteria.cheap_on_gpu),
    "S10": Claim("A GPU trains a frontier while one waits", "ours",
                 "On an NVIDIA H200, twelve members of the frontier of profile gpu on pygpt, 20 million tokens each, "
                 "take less than 3 minutes",
                 "not in the paper", speed_criteria.quick_frontier),
    "C1": Claim("On a known dictionary TopK at the true L0 finds the features, better than ReLU at that L0 and than "
                "TopK at four times it", "ours",
                "In every seed: mean max cosine above 0.9 at k = true L0; higher than ReLU's at the same L0; and lower "
                "at k = 4 times the true L0",
                "not in the paper", criteria.recovery),
}
