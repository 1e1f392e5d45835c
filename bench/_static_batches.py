"""The peer of bench/serve.py: transformers' own generate() on static batches, in a process of its own.

Reads JSON lines ``{"prompts": [[ids]], "num_new": n}``, answers each with ``{"first_s", "total_s"}``: seconds to the
batch's first token and to its end. A batch is as large as the concurrency: its stronger mode here, since all
prompts and outputs are of one length and nobody waits for a slower neighbour.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList


class FirstToken(LogitsProcessor):  # type: ignore[misc]
    """Notes when the first logits are there."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.at is None:
            self.at = time.perf_counter()
        return scores


@torch.inference_mode()
def main(path: str, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    print("ready", flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        ids = torch.tensor(work["prompts"])
        first = FirstToken()
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=work["num_new"],
            min_new_tokens=work["num_new"],
            do_sample=False,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([first]),
        )
        end = time.perf_counter()
        assert first.at is not None
        print(json.dumps({"first_s": first.at - start, "total_s": end - start}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
