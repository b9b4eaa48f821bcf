# An application on ActiveRecord with its defaults (prepared statements, advisory locks), with `variables:` in its
# configuration: ARGV is host, port, user and the application's name.
require 'active_record'

host, port, user, me = ARGV
zone = { 'one' => 'Asia/Kolkata', 'two' => 'Europe/Paris' }[me]

ActiveRecord::Base.establish_connection(
  adapter: 'postgresql', host: host, port: port.to_i, username: user, database: user, pool: 4,
  schema_search_path: "ar_#{me},public", min_messages: 'error',
  variables: { statement_timeout: (me == 'one' ? '31s' : '32s'), lock_timeout: '20s' }
)

def check(what, got, want)
  raise "#{what}: #{got.inspect}, not #{want.inspect}" unless got == want
end

connection = ActiveRecord::Base.connection
connection.execute("DROP SCHEMA IF EXISTS ar_#{me} CASCADE")
connection.execute("CREATE SCHEMA ar_#{me}")

# A migration, under its advisory lock, as `rails db:migrate` runs it.
class CreateItems < ActiveRecord::Migration[6.1]
  def change
    create_table(:items) do |t|
      t.string :name
      t.integer :number
      t.timestamps
    end
    add_index :items, :number
  end
end

migrator = ActiveRecord::Migrator.new(:up, [CreateItems.new('CreateItems', 1)].map { |m| m }, ActiveRecord::SchemaMigration)
ActiveRecord::Migration.verbose = false
tries = 0
begin
  migrator.migrate
rescue ActiveRecord::ConcurrentMigrationError
  # The other application migrates: the lock is the database's.
  tries += 1
  sleep 0.05
  retry if tries < 200
  raise
end

class Item < ActiveRecord::Base
end

threads = 3.times.map do |worker|
  Thread.new do
    ActiveRecord::Base.connection_pool.with_connection do |own|
      15.times do |round|
        item = Item.create!(name: "#{me} #{worker}", number: round)
        check 'found', Item.find(item.id).name, "#{me} #{worker}"
        check 'variables', own.select_value('SHOW statement_timeout'), (me == 'one' ? '31s' : '32s')
        Item.transaction { item.update!(number: round + 100) }
        Item.transaction do
          item.update!(number: -1)
          raise ActiveRecord::Rollback
        end
        check 'rolled back', item.reload.number, round + 100
      end
    end
  end
end
threads.each(&:join)
check 'count', Item.count, 45

# Every length of an IN list is a statement of its own.
(1..200).each { |n| check 'IN', Item.where(id: (1..n).to_a).count, Item.where('id <= ?', n).count }
check 'batches', Item.in_batches(of: 10).sum { |batch| batch.count }, 45
Item.insert_all([{ name: 'bulk', number: 1, created_at: Time.now, updated_at: Time.now }])
connection.execute("SET TIME ZONE '#{zone}'")
check 'zone', connection.select_value('SHOW TimeZone'), zone

# The table is altered by somebody else under the running application: every query recovers by itself.
first = Item.find_by!(name: 'bulk')
other = Thread.new do
  ActiveRecord::Base.connection_pool.with_connection { |c| c.execute("ALTER TABLE ar_#{me}.items ADD COLUMN extra text DEFAULT 'x'") }
end
other.join
5.times do
  check 'after ALTER', Item.find_by!(name: 'bulk').id, first.id
  check 'after ALTER', Item.find(first.id).name, 'bulk'
end
# In a transaction the error is the application's to see, and one retry of the transaction mends it.
5.times { |n| Item.transaction { check 'in one', Item.where(number: n).to_a.size, Item.where(number: n).count } }
connection.execute("ALTER TABLE ar_#{me}.items DROP COLUMN extra")
tries = 0
begin
  Item.transaction { check 'in a transaction', Item.where(name: 'bulk').to_a.size, 1 }
rescue ActiveRecord::PreparedStatementCacheExpired
  tries += 1
  raise if tries > 1
  retry
end
begin
  connection.select_value('SELECT 1/0')
  raise 'no error'
rescue ActiveRecord::StatementInvalid => error
  check 'cause', error.cause.class, PG::DivisionByZero
end
connection.execute("DROP SCHEMA ar_#{me} CASCADE")
puts 'ok'
