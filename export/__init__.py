"""Our models out: folders that AutoModelForCausalLM.from_pretrained() of Hugging Face opens without this repository."""
