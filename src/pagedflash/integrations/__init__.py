"""pagedflash inside other libraries."""
