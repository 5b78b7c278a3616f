"""Train the built-in language model on the interpreter's own standard library.

    python saelib/pygpt/train_pygpt.py --minutes 45

A GPT-2 of 4.2 M parameters and a byte-level BPE of 4,096 tokens, trained on every `.py` file of the
standard library, its test-suite included, but for the held-out files (see `saelib.texts.stdlib_files`).
Interrupt it at any time: the same command goes on from the last checkpoint. It writes, beside itself,
`model.safetensors`, `config.json`, the tokenizer's two files, and `train_log.jsonl`, whose last row holds the
held-out loss beside those of a unigram and of a trigram with back-off, fitted on the same tokens.
"""
import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from saelib.texts import stdlib_files

HERE = Path(__file__).parent
CONTEXT, BATCH, VOCAB, PEAK_LR = 128, 32, 4096, 2e-3
END = "<|endoftext|>"


def read(split: str, tests: bool) -> list[str]:
    return [path.read_text("utf8", errors="replace") for path in stdlib_files(split, tests=tests)]


def encode(tokenizer, texts: list[str]) -> np.ndarray:
    end = tokenizer.token_to_id(END)
    return np.concatenate([np.array([end, *e.ids], np.int64) for e in tokenizer.encode_batch(texts)])


def make_tokenizer():
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(read("train", tests=False), vocab_size=VOCAB, special_tokens=[END],
                                  show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token=END, eos_token=END).save_pretrained(HERE)
    return tokenizer


def counts(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.unique(keys, return_counts=True)


def lookup(table: tuple[np.ndarray, np.ndarray], keys: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(table[0], keys), len(table[0]) - 1)
    return np.where(table[0][at] == keys, table[1][at], 0)


def ngram_losses(train: np.ndarray, test: np.ndarray, discount: float = 0.75) -> dict[str, float]:
    """Held-out nats a token of a unigram (add one) and of interpolated bigrams and trigrams
    (absolute discounting): p(w|h) = max(c(h,w) - D, 0)/c(h) + D N(h)/c(h) p(w|shorter h)."""
    v = VOCAB
    p = (np.bincount(train, minlength=v) + 1)[test] / (len(train) + v)
    losses = {"unigram": float(-np.log(p[2:]).mean())}
    for order in (2, 3):
        key = sum(train[i: len(train) - order + 1 + i] * v ** (order - 1 - i) for i in range(order))
        seen = counts(key)
        contexts = seen[0] // v
        total_of = counts(contexts)[0], np.bincount(np.unique(contexts, return_inverse=True)[1], seen[1])
        kinds_of = counts(contexts)
        asked = sum(test[i: len(test) - order + 1 + i] * v ** (order - 1 - i) for i in range(order))
        c, total, kinds = lookup(seen, asked), lookup(total_of, asked // v), lookup(kinds_of, asked // v)
        shorter, safe = p[order - 1:] if order == 2 else p[1:], np.maximum(total, 1)
        p = np.where(total > 0, np.maximum(c - discount, 0) / safe + discount * kinds / safe * shorter, shorter)
        losses["bigram" if order == 2 else "trigram"] = float(-np.log(p if order == 3 else p[1:]).mean())
    return losses


@torch.no_grad()
def held_out_loss(model, tokens: np.ndarray, most: int = 4096) -> float:
    """Mean cross-entropy in nats over windows of CONTEXT tokens."""
    windows = torch.from_numpy(tokens[: len(tokens) // CONTEXT * CONTEXT].reshape(-1, CONTEXT))
    if len(windows) > most:
        windows = windows[:: len(windows) // most]
    model.eval()
    losses = [model(w, labels=w).loss.item() * len(w) for w in windows.split(32)]
    model.train()
    return sum(losses) / len(windows)


def learning_rate(progress: float) -> float:
    """Linear warm-up for 2 % of the time, then a cosine down to a tenth."""
    if progress < 0.02:
        return PEAK_LR * progress / 0.02
    return PEAK_LR * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1, (progress - 0.02) / 0.98))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=45, help="training time, earlier parts of the run included")
    minutes = parser.parse_args().minutes
    tokenizer = make_tokenizer()
    train, held_out = encode(tokenizer, read("train", tests=True)), encode(tokenizer, read("test", tests=False))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=256, n_layer=4, n_head=4,
                                       activation_function="gelu_pytorch_tanh", bos_token_id=0,
                                       eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                                       attn_implementation="eager"))
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    adam = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                             betas=(0.9, 0.98), fused=True)
    checkpoint, step, spent, log = HERE / "checkpoint.pt", 0, 0.0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"]), adam.load_state_dict(state["adam"])
        step, spent, log = state["step"], state["spent"], state["log"]
    windows = np.lib.stride_tricks.sliding_window_view(train, CONTEXT)
    start = time.monotonic() - spent
    while (spent := time.monotonic() - start) < minutes * 60:
        for group in adam.param_groups:
            group["lr"] = learning_rate(spent / (minutes * 60))
        at = np.random.default_rng(step).integers(len(windows), size=BATCH)
        x = torch.from_numpy(windows[at])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, labels=x).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        step += 1
        if step % 250 == 0:
            row = {"step": step, "tokens": step * BATCH * CONTEXT, "seconds": round(spent),
                   "train": round(loss.item(), 4), "held_out": round(held_out_loss(model, held_out, most=256), 4)}
            log.append(row)
            print(json.dumps(row), flush=True)
            torch.save({"model": model.state_dict(), "adam": adam.state_dict(), "step": step, "spent": spent,
                        "log": log},
                       checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    model.half().save_pretrained(HERE)
    shipped = GPT2LMHeadModel.from_pretrained(HERE, dtype=torch.float32)
    row = {"step": step, "tokens": step * BATCH * CONTEXT, "seconds": round(spent), "train_tokens": len(train),
           "held_out_tokens": len(held_out),
           "held_out": held_out_loss(shipped, held_out), **ngram_losses(train, held_out)}
    print(json.dumps(row), flush=True)
    (HERE / "train_log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*log, row]))


if __name__ == "__main__":
    main()
