"""Models without model definitions: build on the meta device, record, replay block by block, watch the matmuls."""
