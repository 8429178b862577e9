"""From records to token ids: begin with encode, whose Encoder the rest serves."""
