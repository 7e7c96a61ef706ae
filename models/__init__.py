"""What is learned: decoder, tokenizer, pretraining, SFT, reward model, rollouts, PPO. Torch alone, no orchestration."""
