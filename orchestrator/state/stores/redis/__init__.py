"""The store on a Redis or Valkey server. Entry point: `store.RedisStore`."""
