"""From prompts to answers over any executor: sequence, blocks, scheduler, runner, sampling, tokenizer, engine."""
