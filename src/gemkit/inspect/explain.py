"""Explanations of the quantities of `gemkit compare`: meaning, effect of a larger value, common mistakes."""

from __future__ import annotations

from gemkit.family import DecoderConfig, Modality
from gemkit.inspect.units import exact

# keys are those of the rows in compare.py (a test holds the two together)
EXPLANATIONS = {
    "family": """
        The generation or branch it was released with. Members of one share their report, their prompts and most of
        their shape.""",
    "tuning": """
        Pretrained models continue text, and are what you fine-tune. Instruction-tuned ones were trained further to
        take turns in a conversation; a mix was trained on many image tasks at once and answers without fine-tuning.""",
    "prompts": """
        What it was trained to answer: plain text to complete, turns of a chat, code with a gap to fill, an image with
        a task. Any of them will produce text for any prompt, but good text only for its own.""",
    "pieces": """
        Which names the control pieces of the vocabulary carry. The tokenizer of Gemma 1 and 2 is one and the same;
        CodeGemma renames four unused pieces of it for infilling, PaliGemma adds places and masks, Gemma 3 has a new
        one.""",
    "released": """
        The day its weights were published.""",
    "width": """
        The number of channels that every token carries from layer to layer, written to by each layer in turn.
        Wider means more room for what has been worked out so far. Every weight matrix has one side of this length,
        so parameters and arithmetic grow in proportion, and the embedding table with them.""",
    "layers": """
        How many blocks a token passes through and in which order their kinds come. More layers allow more steps of
        reasoning one after another, and each adds its weights, its arithmetic and (attention) its cache. Layers run
        one after the other, so depth costs latency that width does not.""",
    "window": """
        How many tokens a sliding layer sees, the current one included. A larger window sees farther by itself;
        a smaller one caps what the layer has to remember. Information still travels beyond it, one window a layer.""",
    "heads": """
        How many separate questions a token asks of the others in each attention layer. More heads widen the query
        and output projections and the arithmetic of attention, but not the cache, which only key/value heads fill.""",
    "kv_heads": """
        How many sets of keys and values the query heads share: as many as heads is multi-head attention (MHA), one
        is multi-query (MQA), between them grouped-query (GQA). It decides the size of the cache almost alone. Fewer
        make long contexts and large batches cheap, at a small cost in quality.""",
    "head_dim": """
        The length of one query, key or value. Longer heads tell positions and contents apart more finely, and
        widen the projections, the scores and the cache alike.""",
    "ffw_width": """
        The number of hidden units between the MLP's input and output, counted for one of its two branches: the
        gate, which passes through GELU, and the values that it multiplies. Most parameters of a layer are here,
        three matrices of width times this. Larger stores more and costs every token its arithmetic.""",
    "vocabulary": """
        Rows of the embedding table, which also is the output head. A larger vocabulary says the same text in fewer
        tokens, above all outside English. It costs width parameters a row, and the head computes a score for every
        row at every token: in small members this is most of the model.""",
    "context": """
        The number of tokens in the sequences it was trained on. Beyond it, attention meets distances that it has
        never seen and quality falls. It adds no parameters; a longer context is paid for in cache and attention.""",
    "norms": """
        RMSNorms in a block. Two sit before attention and before the MLP; four also tame what each of them adds to
        the residual stream, which steadies training of deep models. Their cost is negligible.""",
    "qk_norm": """
        Whether each query and key is normalised over its head before the rotation. It bounds attention scores by
        construction, which is what the attention soft cap did in Gemma 2, and leaves fast kernels usable.""",
    "attention_softcap": """
        Scores are squashed smoothly into plus or minus this number before softmax, so that none runs away in
        training. A larger cap interferes less; none at all lets every fused attention kernel apply.""",
    "final_softcap": """
        Logits are squashed smoothly into plus or minus this number. The best token stays the best, but its
        probability cannot come too close to one, so sampling, scoring and distillation do change.""",
    "query_scale": """
        Queries are multiplied by this before they meet the keys, so that scores do not grow with the length of a
        head. Larger sharpens attention, smaller flattens it. A power of two costs no rounding in bfloat16.""",
    "rope": """
        How position enters: pairs of channels of each query and key turn by an angle that grows with position, so a
        score depends on the distance of two tokens. A larger base turns more slowly and serves longer contexts;
        a factor stretches positions by as much.""",
    "embed_scale": """
        Embeddings are multiplied by the square root of the width on their way in, and not on their way out. It
        follows from the width and costs nothing.""",
    "biases": """
        Whether the MLP, the attention output and the recurrent projections add a learned constant. They add very
        few parameters.""",
    "parameters": """
        All numbers that were learned. The embedding is counted once although it is used twice, to read tokens and
        to score them.""",
    "embedding": """
        Vocabulary times width. It takes memory, and the head's share of a token's arithmetic, but adds no depth:
        compare members by what is left without it.""",
    "non_embedding": """
        The decoder without its embedding: the part that computes. Reports compare this number, for it tracks both
        quality and speed better than the total.""",
    "vision": """
        The SigLIP tower that turns an image into vectors and the projection to the decoder's width. They run once
        an image and rest while text is decoded.""",
    "float32": """
        Weights at 4 bytes each, as an optimizer keeps them. Training with Adam takes about four times this.""",
    "bfloat16": """
        Weights at 2 bytes each, as they are released. This is what has to fit, before any cache.""",
    "int8": """
        Weights in blocks of 32 with a scale each, 8.5 bits a weight. Close to lossless, and half the time of a
        token where memory bandwidth decides.""",
    "int4": """
        Weights in blocks of 32 with a scale each, 4.5 bits a weight. Some quality is lost, more in small members;
        a token takes about a quarter of the time.""",
    "cache_per_token": """
        Keys and values that one more token leaves behind in bfloat16: 4 bytes times key/value heads times head size,
        for each attention layer. Sliding layers stop growing once their window is full, recurrent ones never grow.""",
    "state_8k": """
        What one sequence of 8,192 tokens keeps in memory beside the weights. Every sequence served at once has its
        own, so this decides how many fit.""",
    "state_full": """
        What one sequence keeps at the longest context the model was trained on. Global layers pay for all of it,
        sliding ones for their window, recurrent ones a constant.""",
    "recurrent_state": """
        What the recurrent layers keep: one float32 number a channel and the last inputs of a short convolution.
        It is the same after ten tokens and after a million, and everything older must fit in it.""",
    "crossing": """
        At which lengths of context, in tokens, it needs less memory than the first model: weights in bfloat16 and the
        state of one sequence together. The number in brackets looks at the state alone, which is what counts when
        many sequences share the weights.""",
    "flops_empty": """
        Arithmetic to decode one token with attention left out: twice the weights that multiply, the output head
        included. It hardly depends on the context until the context is long.""",
    "flops_full": """
        Arithmetic to decode one token at the longest context. What it adds to the row above is attention, 4 times
        heads times head size for each token that each layer sees.""",
    "bytes_full": """
        What is read from memory to decode one token of one sequence: every weight once, and the whole state. Divided
        by the memory bandwidth it is the time of a token on most machines; a batch shares the weights.""",
    "image_size": """
        Every image is squeezed into a square of this many pixels, whatever its shape. Each resolution is a model of its
        own, trained further from the smaller one; only the table of the patches' positions differs in shape.""",
    "image_share": """
        What one image takes of the longest context the model was trained on, before a word is said.""",
    "image_tokens": """
        How many places of the context one image takes, one for each patch of 14 by 14 pixels. Twice the resolution is
        four times the tokens, and shows details and small print.""",
    "image_flops": """
        Arithmetic of the tower and the projection for one image. Patches attend to one another, so this grows faster
        than their number.""",
    "image_state": """
        What the image's tokens leave in the cache, once and for the rest of the sequence. They have seen the
        question too, so that another question on the same image computes them anew.""",
}


def explanation(key: str) -> str:
    """Two or three plain sentences on a quantity."""
    return " ".join(EXPLANATIONS[key].split())


def confusions(key: str, decoder: DecoderConfig, vision: Modality | None) -> list[str]:
    """The common mistake about a quantity of this decoder, with its own numbers; often empty."""
    d, v = decoder.width, decoder.vocab_size
    mixers = dict.fromkeys((mixer.heads, mixer.kv_heads, mixer.head_dim) for mixer in decoder.attention)
    said: list[str] = []
    match key:
        case "ffw_width":
            said.extend(
                f"Some configurations and articles print {exact(2 * f)}: they count both branches of an MLP "
                f"that is {exact(f)} wide."
                for f in dict.fromkeys(layer.ffw.width for layer in decoder.layers)
            )
        case "head_dim":
            said.extend(
                f"The head size is not width / heads = {d / n:g}: {n} heads of {h} are {exact(n * h)} wide, "
                f"and the output projection brings them back to {exact(d)}."
                for n, _, h in mixers
                if n * h != d
            )
        case "heads":
            said.extend(
                f"width x heads x head size = {exact(d * n * h)} is the query projection alone; the whole attention of "
                f"a layer has {exact(2 * d * (n + kv) * h)} weights."
                for n, kv, h in mixers
            )
        case "vocabulary" if v == 256_000:
            said.append(
                "Reports count 256,128 rows: the original Flax table, padded to a multiple of 128. "
                "The tokenizer has 256,000 pieces, and so do the released tables."
            )
        case "vocabulary" if v == 257_216:
            said.append(
                "257,152 rows are used: 256,000 pieces, 1,024 locations and 128 mask codes. Hugging Face adds an "
                "image placeholder and pads to a multiple of 64."
            )
        case "vocabulary" if v == 262_144:
            said.append("Hugging Face pads the multimodal sizes to 262,208 rows for the image placeholder.")
        case "norms" if not decoder.post_norms and not decoder.recurrent:
            said.append(
                "Published checkpoints call the norm before the MLP post_attention_layernorm. It does not touch the "
                "output of attention; in Gemma 2 and 3 the same name is another norm, which does."
            )
        case "query_scale":
            said.extend(
                f"It is not 1/sqrt(head size): this member divides by sqrt(width / heads) = {(d / n) ** 0.5:g}."
                for n in dict.fromkeys(
                    mixer.heads for mixer in decoder.attention if abs(mixer.scale * mixer.head_dim**0.5 - 1) > 1e-6
                )
            )
        case "window" if 2049 in decoder.windows:
            said.append(
                "2,049 is 2,048 earlier tokens and the current one, as in the reference; Hugging Face lets a token "
                "see one fewer."
            )
        case "attention_softcap" if any(mixer.softcap for mixer in decoder.attention):
            said.append("Attention kernels that cannot express the cap have been used without it, silently.")
        case "final_softcap" if decoder.final_softcap and vision:
            said.append("The original code leaves the cap out of training and prefill; Hugging Face applies it.")
        case "embed_scale" if (sqrt := d**0.5) != bfloat16(sqrt):
            whose = (
                "whatever dtype the model runs in"
                if decoder.embed_scale_dtype == "bfloat16"
                else "when the model runs in it"
            )
            said.append(f"In bfloat16 the factor is {bfloat16(sqrt):g}, not {sqrt:.4f}; it is used {whose}.")
        case "parameters":
            said.append("Tools that list lm_head beside the embedding count the same table twice.")
        case "biases" if decoder.biases:
            said.append("The query, key and value projections have none.")
    return said


def bfloat16(x: float) -> float:
    """A number rounded to the nearest bfloat16, ties to even."""
    import struct

    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]
