-- Applies a commit, or refuses it. KEYS: the documents, the log and the commit ids; `store.py` describes them.
-- ARGV: id, time (empty: the server's), author, newest position known to the caller, payload, then two counted lists:
-- guards KEY EPOCH, and writes KEY EXPECTED LENGTH TTL. The payload is `[[VALUE,...],[EVENT,...]]`.
-- Returns the position, or {'refused', TIME}, {'damaged', KEY}, {'lost', POSITION}.
local documents, log, commits = unpack(KEYS)
local id, time, by, known, payload = unpack(ARGV, 1, 5)
local index = 5

local function take()
  index = index + 1
  return ARGV[index]
end

local function seal(text)
  return redis.sha1hex(text) .. text
end

-- Returns the newest version of a document, also of a deleted one; nil if it is damaged.
local function read(key)
  local stored = redis.call('HGET', documents, key)
  if not stored then return {version = 0, found = '0', value = '{}', position = 0} end
  local text = string.sub(stored, 41)
  if redis.sha1hex(text) ~= string.sub(stored, 1, 40) then return nil end
  local version, position, expires, value = string.match(text, '^(%d+) (%d+) %S+ (%S+) [^\n]*\n(.*)$')
  if value == '' or (expires ~= '-' and tonumber(time) >= tonumber(expires)) then
    return {version = version, found = '0', value = '{}', position = position}
  end
  return {version = version, found = version, value = value, position = position}
end

local applied = redis.call('HGET', commits, id)
if applied then
  redis.call('HSET', commits, id, applied) -- WAITAOF waits for the writes of this connection
  return tonumber(applied)
end
local position = tonumber(redis.call('HGET', documents, 'position') or 0)
if position < tonumber(known) then return {'lost', position} end
position = position + 1
if time == '' then
  local now = redis.call('TIME')
  time = now[1] .. '.' .. string.format('%06d', now[2])
end

for _ = 1, take() do
  local key, epoch = take(), tonumber(take())
  local lease = read(key)
  if not lease then return {'damaged', key} end
  if cjson.decode(lease.value).epoch ~= epoch then return {'refused', time} end
end
local changes, entries, start = {}, {'position', position}, 3
for number = 1, take() do
  local key, expected, length, ttl = take(), take(), tonumber(take()), take()
  local before, value, expires = read(key), '', '-'
  if not before then return {'damaged', key} end
  if before.found ~= expected then return {'refused', time} end
  if length > 0 then
    value = string.sub(payload, start, start + length - 1)
    start = start + length + 1
    if ttl ~= '' then expires = string.format('%.17g', tonumber(time) + tonumber(ttl)) end
  end
  local change = {string.sub(key, 2, -2), before.version + 1, length, before.position}
  if expires ~= '-' then change[5] = expires end
  changes[number] = '[' .. table.concat(change, ',') .. ']'
  entries[#entries + 1] = key
  entries[#entries + 1] = seal(table.concat({change[2], position, time, expires, by}, ' ') .. '\n' .. value)
end

-- An error between the writes would undo nothing. Only the first can fail for lack of memory; Redis 6.2 can't check more.
if redis.acl_check_cmd and not (redis.acl_check_cmd('XADD', log, '1-0', 'r', '')
    and redis.acl_check_cmd('HSET', documents, 'f', '') and redis.acl_check_cmd('HSET', commits, 'f', '')) then
  return redis.error_reply('NOPERM this user has no permissions to run XADD and HSET')
end
local head = '{"position":' .. position .. ',"time":' .. time .. ',"by":' .. by
  .. ',"changes":[' .. table.concat(changes, ',') .. ']}'
redis.call('XADD', log, position .. '-0', 'record', seal(head) .. '\n' .. seal(payload), 'id', id)
for first = 1, #entries, 1000 do
  redis.call('HSET', documents, unpack(entries, first, math.min(first + 999, #entries)))
end
redis.call('HSET', commits, id, position)
return position
