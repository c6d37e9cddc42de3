"""The keys of the JSON files beside a `config.json`, and the effect of each here (form: `weights.known_keys`).

Sources: Transformers 5.23, generation/configuration_utils.py, tokenization_utils_base.py and _tokenizers.py,
models/gemma/tokenization_gemma.py, image_processing_utils.py, models/siglip and models/paligemma.
"""

from __future__ import annotations

from gemkit.weights.known_keys import Table, ignored, noted, refused, used

_COMPUTED, _GIVEN = "how it is computed", "what is given back"
_SPECULATION, _OTHER_WAY = "speculation, same answer", "it is not implemented"
GENERATION: Table = {
    **used("whether conversations are sampled", "do_sample"),
    **used("sampling of conversations, where do_sample is true", "temperature", "top_k", "top_p", "min_p"),
    **used("in every answer", "repetition_penalty", "suppress_tokens", "bad_words_ids", "stop_strings"),
    **used("the ends of answers", "eos_token_id"),
    **ignored("the tokenizer has them", "bos_token_id", "pad_token_id", "decoder_start_token_id"),
    **ignored("about the file", "_from_model_config", "transformers_version", "generation_kwargs", "_commit_hash"),
    **ignored(_COMPUTED, "use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory"),
    **ignored(_COMPUTED, "prefill_chunk_size", "compile_config", "disable_compile", "continuous_batching_config"),
    **ignored(_GIVEN, "return_dict_in_generate", "output_scores", "output_logits", "output_attentions"),
    **ignored(_GIVEN, "output_hidden_states"),
    **ignored(_SPECULATION, "assistant_confidence_threshold", "num_assistant_tokens", "speculation_type"),
    **ignored(_SPECULATION, "num_assistant_tokens_schedule", "prompt_lookup_num_tokens", "use_mtp"),
    **ignored(_SPECULATION, "assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
    **ignored(_SPECULATION, "max_matching_ngram_size", "is_assistant", "assistant_ensemble_weight"),
    **ignored("of beams alone", "early_stopping", "length_penalty"),
    **ignored("the order of tokens stays", "renormalize_logits", "remove_invalid_values"),
    **noted("the caller says how long an answer may be (max_tokens)", ["max_length", "max_new_tokens", "max_time"]),
    **noted("an answer is one sequence", ["num_beams", "num_beam_groups", "num_return_sequences"], 1),
    **noted(_OTHER_WAY, ["no_repeat_ngram_size", "min_length", "min_new_tokens", "penalty_alpha"], 0),
    **noted(_OTHER_WAY, ["epsilon_cutoff", "eta_cutoff", "diversity_penalty", "encoder_no_repeat_ngram_size"], 0),
    **noted(_OTHER_WAY, ["typical_p", "top_h", "encoder_repetition_penalty", "guidance_scale"], 1),
    **noted(_OTHER_WAY, ["forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens"]),
    **noted(_OTHER_WAY, ["exponential_decay_length_penalty", "sequence_bias", "watermarking_config"]),
    **noted(_OTHER_WAY, ["dola_layers", "constraints", "force_words_ids"]),
    **noted(_OTHER_WAY, ["token_healing"], False),
}  # fmt: skip

_BATCHES, _VARIABLE = "of batches, where a caller asks for it", "special tokens: variables of a chat template"
_PLACE, _RESULTS = "where the file came from", "the shape of Python results"
TOKENIZER: Table = {
    **used("special tokens: variables of a chat template, and the end of answers", "bos_token", "eos_token"),
    **used(_VARIABLE, "pad_token", "unk_token", "mask_token", "sep_token", "cls_token", "boi_token", "eoi_token"),
    **used(_VARIABLE, "image_token", "audio_token", "boa_token", "eoa_token"),
    **used("special tokens by names of the model's own", "extra_special_tokens", "model_specific_special_tokens"),
    **used("tokens that steer the model", "additional_special_tokens"),
    **used("added or renamed tokens", "added_tokens_decoder"),
    **used("whether <bos> is put before a text, where there is no tokenizer.json", "add_bos_token"),
    **noted("a prompt that ends with <eos> has been answered", ["add_eos_token"], False),
    **used("turns of a conversation", "chat_template"),
    **used("GemmaTokenizer splits texts in its own way, a class of no model as tokenizer.json says; others are refused",
           "tokenizer_class"),
    **refused("it changes the ids of texts; with False the folder can be opened", ["split_special_tokens"], False),
    **noted("Transformers 5 passes it over for this family", ["add_prefix_space", "do_lower_case"], False),
    **noted("Transformers 5 passes it over, and 4 sampled or changed the ids of texts by it", ["sp_model_kwargs"], {}),
    **ignored("Transformers 5 passes it over for BPE", "clean_up_tokenization_spaces"),
    **noted("answers are decoded exactly", ["clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"],
            False),
    **ignored("max_position_embeddings of config.json counts", "model_max_length", "max_len"),
    **ignored(_BATCHES, "padding_side", "truncation_side", "stride", "pad_to_multiple_of", "pad_token_type_id"),
    **ignored(_BATCHES, "truncation_strategy", "truncation", "padding", "max_length", "max_pad_length"),
    **ignored("of decoding in the slow tokenizer of Transformers 4", "spaces_between_special_tokens"),
    **ignored("of Llama's and Mistral's tokenizers", "legacy", "use_default_system_prompt", "fix_mistral_regex"),
    **ignored("names code or its version; no code of a file is run", "auto_map", "transformers_version"),
    **ignored(_RESULTS, "model_input_names", "return_token_type_ids", "verbose", "response_schema"),
    **ignored(_RESULTS, "response_template", "chat_control_tokens"),
    **ignored(_PLACE, "name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "_commit_hash"),
    **ignored(_PLACE, "is_local", "local_files_only", "from_slow", "use_fast", "backend", "processor_class"),
    **ignored(_PLACE, "device_map", "files_loaded", "unsloth_version", "unsloth_fixed"),
}  # fmt: skip

TOKENIZER_JSON: Table = {
    **ignored("of the file format", "version"),
    **used("pieces and merges", "model"),
    **used("added tokens", "added_tokens"),
    **used("whether <bos> is put before a text", "post_processor"),
    **used("must be the family's; where tokenizer_class is GemmaTokenizer, passed over with a note, as in Transformers",
           "normalizer", "pre_tokenizer", "decoder"),
    **ignored(_BATCHES, "truncation", "padding"),
}  # fmt: skip

PROCESSOR: Table = {
    **used("of pictures, with keys of its own", "image_processor"),
    **used("turns of a conversation", "chat_template"),
    **used("placeholders of an image: must be the patches of the tower", "image_seq_length"),
    **ignored("the model type says it", "processor_class", "auto_map"),
    **ignored(_BATCHES, "padding", "text_kwargs"),
    **ignored("of sound and films", "audio_processor", "video_processor", "feature_extractor"),
    **ignored("the tokenizer's own file says it", "tokenizer"),
}  # fmt: skip
_SQUARE, _CROPPED = "the tower takes squares of its own size", "of do_center_crop and do_pad, which are refused"
PREPROCESSOR: Table = {
    **used("values of pixels", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    **used("Pillow's filter", "resample"),
    **used("must be the square of the tower", "size"),
    **used("placeholders of an image: must be the patches of the tower", "image_seq_length"),
    **used("must be SigLIP's", "image_processor_type", "feature_extractor_type"),
    **refused(_SQUARE, ["do_resize"], True),
    **refused(_SQUARE, ["do_center_crop", "do_pad"], False),
    **ignored(_CROPPED, "crop_size", "pad_size"),
    **ignored("size has height and width", "default_to_square"),
    **ignored("pictures are made RGB; without it Transformers takes no others", "do_convert_rgb"),
    **ignored(_RESULTS, "data_format", "input_data_format", "return_tensors", "device", "disable_grouping"),
    **ignored(_RESULTS, "model_input_names"),
    **ignored(_PLACE, "processor_class", "_processor_class", "auto_map", "_valid_processor_keys", "backend"),
    **ignored(_PLACE, "use_fast", "transformers_version"),
    **refused("of Gemma 3's tower", ["do_pan_and_scan"], False),
    **ignored("of do_pan_and_scan, which is refused", "pan_and_scan_min_crop_size", "pan_and_scan_max_num_crops"),
    **ignored("of do_pan_and_scan, which is refused", "pan_and_scan_min_ratio_to_activate"),
}  # fmt: skip
