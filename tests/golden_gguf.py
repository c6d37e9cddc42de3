"""Write tests/data/gguf.json: what llama.cpp answers to the variants of `support/gguf_variants.py`.

    PYTHONPATH=tests python tests/golden_gguf.py FOLDER                   writes the variants to a folder
    python tests/golden_gguf.py FOLDER tests/data/gguf.json               asks llama.cpp (llama-cpp-python 0.3.36)

Of each file: the logarithm of the probability of every next token. Two steps, since an environment with llama.cpp need
not have gemkit.
"""

import json
import sys
from pathlib import Path


def write(folder):
    from support.gguf_variants import VARIANTS, ids

    for name, variant in VARIANTS.items():
        variant(folder / f"{name}.gguf")
    (folder / "ids.json").write_text(json.dumps(ids()))


def ask(path, ids):
    import llama_cpp
    import numpy as np

    try:
        model = llama_cpp.Llama(str(path), n_ctx=64, n_batch=64, n_threads=1, logits_all=True, verbose=False)
    except ValueError:
        return "refused"
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)], np.float64)
    logits -= logits.max(-1, keepdims=True)
    found = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [round(float(found[i, token]), 6) for i, token in enumerate(ids[1:])]


def main():
    folder = Path(sys.argv[1])
    if len(sys.argv) == 2:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)
        return
    import llama_cpp

    ids = json.loads((folder / "ids.json").read_text())
    answers = {}
    for path in sorted(folder.glob("*.gguf")):
        name, _, number = path.stem.partition("-0000")
        if not number or number.startswith("1"):
            answers[name] = ask(path, ids)
    found = {"made_by": f"tests/golden_gguf.py, llama-cpp-python {llama_cpp.__version__}", "ids": ids, "next": answers}
    Path(sys.argv[2]).write_text(json.dumps(found).replace('], "', '],\n"') + "\n")


main()
